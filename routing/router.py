"""What decides which adapters a request uses, and the record of that decision."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from adapters_store.registry import Resolved
from adapters_store.store import AdapterStore
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
    """One adapter of a decision: what its name meant. `score` is the router's, None where nothing was scored."""

    resolved: Resolved
    weight: float
    score: float | None = None

    @property
    def name(self) -> str:
        return self.resolved.name

    @property
    def owner(self) -> str:
        """The tenant that the name belongs to."""
        return self.resolved.tenant

    @property
    def digest(self) -> str:
        return self.resolved.digest


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
    def resolved(self) -> tuple[Resolved, ...]:
        """The adapters that the mix needs, under the names that were asked for."""
        needed = set(self.mix.digests)
        return tuple({entry.resolved: None for entry in self.adapters if entry.digest in needed})

    @property
    def label(self) -> str:
        """Name of the mix in metrics."""
        names = "+".join(sorted({adapter.name for adapter in self.adapters})) or "base"
        return names if len(names) <= LONGEST_LABEL else f"{len(self.adapters)} adapters"


class Router(Protocol):
    """Turns a query into a route. Raises RouteError, RegistryError."""

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
        names = [adapter.name for adapter in query.adapters or ()]
        if query.model != self._served_name:
            names.append(query.model)
        found = await self._store.resolve(query.tenant, names) if names else {}
        entries = self._named(query, found) if query.adapters is None else self._listed(query, query.adapters, found)
        entries = _compose(entries, query.composition)
        mix = Mix.of([(entry.digest, entry.weight) for entry in entries], query.composition)
        router = self.name if entries else None
        return Route(router, tuple(entries), query.composition, mix, self._clock() - started)

    def _named(self, query: RouteQuery, found: Mapping[str, Resolved]) -> list[RoutedAdapter]:
        if query.model == self._served_name:
            return []
        return [RoutedAdapter(self._meaning(found, query.model, "model"), 1.0)]

    def _listed(
        self, query: RouteQuery, adapters: tuple[NamedWeight, ...], found: Mapping[str, Resolved]
    ) -> list[RoutedAdapter]:
        self._named(query, found)  # an unknown model is an error even where the list overrides it
        return [
            RoutedAdapter(
                self._meaning(found, adapter.name, f"lora.adapters.{index}.name"),
                1.0 / len(adapters) if adapter.weight is None else adapter.weight,
            )
            for index, adapter in enumerate(adapters)
        ]

    def _meaning(self, found: Mapping[str, Resolved], name: str, param: str) -> Resolved:
        if name in found:
            return found[name]
        what = f"expected {self._served_name!r} or an adapter's name" if param == "model" else "no such adapter"
        message = f"{param}: {name[:200]!r} does not exist, {what}"
        raise RouteError(message, param=param, code="model_not_found")


class Routers:
    """The explicit router and, by name, those that choose from the prompt."""

    def __init__(
        self, explicit: ExplicitRouter, routers: Mapping[str, Router] | None = None, default: str | None = None
    ) -> None:
        self._explicit = explicit
        self._routers = dict(routers or {})
        self._default = default

    async def route(self, query: RouteQuery) -> Route:
        """The decision of the router that the query asks for. Raises RouteError, RegistryError."""
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
        return [replace(chosen, weight=1.0)]
    if composition is Composition.FUSION and entries:
        total = math.fsum(entry.weight for entry in entries)
        if abs(total) <= 1e-9 * math.fsum(abs(entry.weight) for entry in entries):
            raise RouteError("lora.adapters: the weights of a fusion must not sum to 0", param="lora.adapters")
        return [replace(entry, weight=entry.weight / total) for entry in entries]
    return entries
