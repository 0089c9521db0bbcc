"""What decides which adapters a request uses, and the record of that decision."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from adapters_store.store import AdapterStore, UnknownAdapter
from adapters_store.types import Composition, Mix

AUTO = "auto"
"""The model name, alone or before `:<router>`, that leaves the choice to a router."""

LONGEST_LABEL = 256
"""Characters of a mix's name in metrics; three adapters with names of usual length take a quarter of it."""


class RouteError(ValueError):
    """A request that cannot be routed. `code` is `model_not_found` for unknown names; `param` names the field."""

    def __init__(self, message: str, *, param: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


@dataclass(frozen=True)
class NamedWeight:
    """One adapter as the client names it. Without a weight each of n adapters gets 1/n."""

    name: str
    weight: float | None = None


@dataclass(frozen=True)
class RouteQuery:
    """What a client says about adapters. `adapters`, an explicit mix, overrides `model`; None says nothing."""

    tenant: str
    model: str
    adapters: tuple[NamedWeight, ...] | None = None
    composition: Composition = Composition.MIXTURE
    router: str | None = None


@dataclass(frozen=True)
class RoutedAdapter:
    """One adapter of a decision. `score` is the router's, None where nothing was scored."""

    name: str
    digest: str
    weight: float
    score: float | None = None


@dataclass(frozen=True)
class Route:
    """The decision for one request. `router` is None for the base model; `adapters` has names, `mix` digests."""

    router: str | None
    adapters: tuple[RoutedAdapter, ...]
    composition: Composition
    mix: Mix
    seconds: float = 0.0
    cached: bool = False

    @property
    def label(self) -> str:
        """Name of the mix in metrics."""
        names = "+".join(sorted({adapter.name for adapter in self.adapters})) or "base"
        return names if len(names) <= LONGEST_LABEL else f"{len(self.adapters)} adapters"


class Router(Protocol):
    """Turns a query into a route. Raises RouteError."""

    @property
    def name(self) -> str: ...

    async def route(self, query: RouteQuery) -> Route: ...


class ExplicitRouter:
    """The client itself names the adapters, by `model` or as a weighted list. `clock` counts seconds."""

    name = "explicit"

    def __init__(self, store: AdapterStore, served_name: str, clock: Callable[[], float]) -> None:
        self._store = store
        self._served_name = served_name
        self._clock = clock

    async def route(self, query: RouteQuery) -> Route:
        started = self._clock()
        entries = self._named(query) if query.adapters is None else self._listed(query, query.adapters)
        entries = _compose(entries, query.composition)
        mix = Mix.of([(entry.digest, entry.weight) for entry in entries], query.composition)
        router = self.name if entries else None
        return Route(router, tuple(entries), query.composition, mix, self._clock() - started)

    def _named(self, query: RouteQuery) -> list[RoutedAdapter]:
        if query.model == self._served_name:
            return []
        return [self._resolve(query.tenant, query.model, 1.0, param="model")]

    def _listed(self, query: RouteQuery, adapters: tuple[NamedWeight, ...]) -> list[RoutedAdapter]:
        self._named(query)  # an unknown model is an error even where the list overrides it
        return [
            self._resolve(
                query.tenant,
                adapter.name,
                1.0 / len(adapters) if adapter.weight is None else adapter.weight,
                param=f"lora.adapters.{index}.name",
            )
            for index, adapter in enumerate(adapters)
        ]

    def _resolve(self, tenant: str, name: str, weight: float, param: str) -> RoutedAdapter:
        try:
            adapter = self._store.resolve(tenant, name)
        except UnknownAdapter:
            what = f"expected {self._served_name!r} or an adapter's name" if param == "model" else "no such adapter"
            message = f"{param}: {name[:200]!r} does not exist, {what}"
            raise RouteError(message, param=param, code="model_not_found") from None
        return RoutedAdapter(adapter.name, adapter.digest, weight)


class Routers:
    """The explicit router and, by name, those that choose from the prompt."""

    def __init__(
        self, explicit: ExplicitRouter, routers: Mapping[str, Router] | None = None, default: str | None = None
    ) -> None:
        self._explicit = explicit
        self._routers = dict(routers or {})
        self._default = default

    async def route(self, query: RouteQuery) -> Route:
        """The decision of the router that the query asks for. Raises RouteError."""
        return await self._select(query).route(query)

    def _select(self, query: RouteQuery) -> Router:
        is_auto = query.model == AUTO or query.model.startswith(f"{AUTO}:")
        if query.router is None and not is_auto:
            return self._explicit
        param = "lora.router" if query.router is not None else "model"
        if query.adapters is not None:
            raise RouteError("lora.adapters: an explicit list of adapters excludes a router", param="lora.adapters")
        name = query.router or query.model.partition(":")[2] or self._default
        if not self._routers:
            raise RouteError(
                f"{param}: no router is available in this server; name the base model or an adapter in model,"
                " or a mix in lora.adapters",
                param=param,
                code="no_router",
            )
        if name is None or name not in self._routers:
            raise RouteError(f"{param}: there is no such router", param=param, code="router_not_found")
        return self._routers[name]


def _compose(entries: list[RoutedAdapter], composition: Composition) -> list[RoutedAdapter]:
    """The adapters with the weights that they are applied with."""
    if composition is Composition.SELECTION and entries:
        chosen = max(entries, key=lambda entry: entry.weight)
        return [RoutedAdapter(chosen.name, chosen.digest, 1.0, chosen.score)]
    if composition is Composition.FUSION and entries:
        total = math.fsum(entry.weight for entry in entries)
        if abs(total) <= 1e-9 * math.fsum(abs(entry.weight) for entry in entries):
            raise RouteError("lora.adapters: the weights of a fusion must not sum to 0", param="lora.adapters")
        return [RoutedAdapter(entry.name, entry.digest, entry.weight / total, entry.score) for entry in entries]
    return entries
