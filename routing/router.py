"""What decides which adapters a request uses, and the record of that decision."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Protocol

from adapters_store.registry import Resolved
from adapters_store.store import AdapterStore
from adapters_store.types import Composition, Mix
from routing.router_options import RouterOptions
from server.engine.gates import GateUse
from server.engine.prompt_routers import Decided, PromptUse

AUTO = "auto"
"""The model name, alone or before `:<router>`, that leaves the choice to a router."""

SHOWN_ROUTERS = 10

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
    """What a client says about adapters. `adapters`, an explicit mix, overrides `model`; None says nothing.

    `text` is what a router chooses from: the user's words, without the chat template. `default_router` is what `auto`
    means for the tenant, if it is not the server's own default.
    """

    tenant: str
    model: str
    adapters: tuple[NamedWeight, ...] | None = None
    composition: Composition = Composition.MIXTURE
    router: str | None = None
    text: str | None = None
    options: RouterOptions = field(default_factory=RouterOptions)
    default_router: str | None = None

    @property
    def is_automatic(self) -> bool:
        """Whether a router is to choose."""
        return self.router is not None or self.model == AUTO or self.model.startswith(f"{AUTO}:")

    @property
    def router_param(self) -> str:
        """The field that asks for a router."""
        return "lora.router" if self.router is not None else "model"


@dataclass(frozen=True)
class RoutedAdapter:
    """One adapter of a decision: what its name meant. `score` is the router's, None where nothing was scored.

    `share`: of a router that decides token by token, the mean weight that it gave the adapter in the answer.
    """

    resolved: Resolved
    weight: float
    score: float | None = None
    share: float | None = None

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


class Outcome(StrEnum):
    """What came of a decision. A router that chooses nothing leaves the request to the base model."""

    ROUTED = "routed"
    BELOW_MIN_SCORE = "below_min_score"
    NO_CANDIDATES = "no_candidates"
    EMPTY_TEXT = "empty_text"
    NO_ADAPTER = "no_adapter"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Scored:
    """One candidate's score, the higher the better."""

    name: str
    score: float


@dataclass(frozen=True)
class Route:
    """The decision for one request. `adapters` has names, `mix` digests; both are empty for the base model.

    `router` is None where nothing was to be chosen, `best` the highest score of any candidate. `scores`, of all
    candidates and best first, are there when the query asked for an explanation. With `gates` every token weighs the
    adapters anew; a `prompt_router` chooses once among its `experts`, which are named, and of these it has `decided`
    for some, or has still to decide. `warnings` are sentences for the client.
    """

    router: str | None
    adapters: tuple[RoutedAdapter, ...]
    composition: Composition
    mix: Mix
    seconds: float = 0.0
    cached: bool = False
    outcome: Outcome = Outcome.ROUTED
    best: float | None = None
    scores: tuple[Scored, ...] | None = None
    gates: GateUse | None = None
    prompt_router: PromptUse | None = None
    experts: tuple[str | None, ...] = ()
    decided: Decided | None = None
    warnings: tuple[str, ...] = ()

    @property
    def resolved(self) -> tuple[Resolved, ...]:
        """The adapters that the mix needs, under the names that were asked for."""
        needed = set(self.mix.digests)
        return tuple({entry.resolved: None for entry in self.adapters if entry.digest in needed})

    @cached_property
    def label(self) -> str:
        """Name of the mix in metrics."""
        if self.gates is not None or self.prompt_router is not None:
            return f"{AUTO}:{self.router}"
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
        entries = compose(entries, query.composition)
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
    """The explicit router and, by name, those that choose from the prompt.

    `absent` says why there is none, for those who ask for one.
    """

    def __init__(
        self,
        explicit: ExplicitRouter,
        routers: Mapping[str, Router] | None = None,
        default: str | None = None,
        absent: str = "this server has none",
    ) -> None:
        self.default = default
        self.absent = absent
        self._explicit = explicit
        self._routers = dict(routers or {})
        self._companions: dict[str, str] = {}  # digests by name of the router

    @property
    def names(self) -> tuple[str, ...]:
        """Of the routers that choose, sorted."""
        return tuple(sorted(self._routers))

    def put(self, router: Router, trained_with: str | None = None) -> None:
        """From now on the router of this name is this one.

        trained_with: digest of an adapter that is not meant to be used without it.
        """
        self._routers[router.name] = router
        self._companions.pop(router.name, None)
        if trained_with is not None:
            self._companions[router.name] = trained_with

    def drop(self, name: str) -> None:
        """From now on there is no router of this name."""
        self._routers.pop(name, None)
        self._companions.pop(name, None)

    async def route(self, query: RouteQuery) -> Route:
        """The decision of the router that the query asks for. Raises RouteError, RegistryError."""
        return self.warned(await self.select(query).route(query))

    def warned(self, route: Route) -> Route:
        """With a warning for every adapter that was trained together with another router than the one that decides."""
        if not self._companions:
            return route
        names = {adapter.digest: adapter.name for adapter in route.adapters}
        warnings = tuple(
            f"adapter {names[digest]!r} was trained together with router {router!r}, which chooses among its linears:"
            f" without it answers are not those that it was trained for"
            for router, digest in self._companions.items()
            if digest in names and router != route.router
        )
        return replace(route, warnings=warnings) if warnings else route

    def select(self, query: RouteQuery) -> Router:
        """Who decides. Raises RouteError."""
        if not query.is_automatic:
            return self._explicit
        param = query.router_param
        if query.adapters is not None:
            raise RouteError("lora.adapters: an explicit list of adapters excludes a router", param="lora.adapters")
        if not self._routers:
            raise RouteError(
                f"{param}: no router is available: {self.absent}. Name the base model or an adapter in model,"
                " or a mix in lora.adapters",
                param=param,
                code="no_router",
            )
        _, colon, named = query.model.partition(":")
        name = query.router or (named if colon else query.default_router or self.default)
        if name is None or name not in self._routers:
            expected = ", ".join(self.names[:SHOWN_ROUTERS])
            absent = AUTO if name is None else name[:200]
            message = f"{param}: there is no router {absent!r}, expected one of {expected}"
            raise RouteError(message, param=param, code="router_not_found")
        return self._routers[name]


def compose(entries: list[RoutedAdapter], composition: Composition) -> list[RoutedAdapter]:
    """The adapters with the weights that they are applied with. Raises RouteError for a fusion that weighs nothing.

    A selection takes the entry of highest score, or of highest weight where nothing was scored; the first on a tie.
    """
    if composition is Composition.SELECTION and entries:
        chosen = max(entries, key=lambda entry: entry.weight if entry.score is None else entry.score)
        return [replace(chosen, weight=1.0)]
    if composition is Composition.FUSION and entries:
        total = math.fsum(entry.weight for entry in entries)
        if abs(total) <= 1e-9 * math.fsum(abs(entry.weight) for entry in entries):
            raise RouteError("lora.adapters: the weights of a fusion must not sum to 0", param="lora.adapters")
        return [replace(entry, weight=entry.weight / total) for entry in entries]
    return entries
