"""Routers that decide token by token: which adapters a request brings along, and how its gates choose among them."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapters_store.store import AdapterStore
from adapters_store.types import Composition, Mix
from routing.candidates import usable
from routing.gate_folder import GateCard
from routing.router import Outcome, Route, RoutedAdapter, RouteError, RouteQuery
from routing.router_options import RouterOptions
from server.engine.gates import GateUse


@dataclass(frozen=True)
class GatedOptions:
    """How many rows a token uses, and the temperature of their weights."""

    top_k: int
    temperature: float


class GatedRouter:
    """A MeteoRA router: every adapter of its card that the tenant may use is there, and every token weighs them anew.

    An adapter is used with the very weights that the gates were trained for (`routing.candidates.usable`); where that
    is not so its row cannot be chosen. `folder` holds the gates, `clock` counts seconds.
    """

    def __init__(
        self, name: str, card: GateCard, folder: Path, store: AdapterStore, clock: Callable[[], float]
    ) -> None:
        self.name = name
        self._card = card
        self._folder = folder
        rows = [card.sha256, *(adapter.digest for adapter in card.adapters)]  # equal gates may have other adapters
        self._digest = hashlib.sha256(" ".join(rows).encode()).hexdigest()
        self._store = store
        self._clock = clock

    async def route(self, query: RouteQuery) -> Route:
        """The decision. Raises RouteError: `model_not_found` for a candidate that the tenant may not see,
        `invalid_value` for options that do not apply; RegistryError.
        """
        started = self._clock()
        options = self._settle(query)
        found = await usable(self._store, query, self._card.adapters)
        adapters = {each.digest: RoutedAdapter(each, 1.0) for each in found if each is not None}
        if not adapters:
            none = Outcome.NO_CANDIDATES
            return Route(self.name, (), query.composition, Mix(), self._clock() - started, outcome=none)
        gates = GateUse(
            self._digest,
            str(self._folder),
            tuple(None if each is None else each.digest for each in found),
            options.top_k,
            options.temperature,
            self._card.has_null,
        )
        mix = Mix(tuple((digest, 1.0) for digest in sorted(adapters)))
        seconds = self._clock() - started
        return Route(self.name, tuple(adapters.values()), query.composition, mix, seconds, gates=gates)

    def _settle(self, query: RouteQuery) -> GatedOptions:
        """The options with this router's defaults. Raises RouteError."""
        options = query.options
        self._refuse(options)
        if query.composition is not Composition.MIXTURE:
            what = f"router {self.name!r} weighs its adapters token by token, expected 'mixture'"
            raise RouteError(f"lora.composition: {what}", param="lora.composition")
        top_k = self._card.top_k if options.top_k is None else options.top_k
        temperature = self._card.temperature if options.temperature is None else options.temperature
        if top_k < 1:
            raise RouteError(f"lora.top_k: {top_k} is too small, expected at least 1", param="lora.top_k")
        if not (temperature > 0 and math.isfinite(temperature)):
            message = f"lora.temperature: {temperature} is not allowed, expected a number above 0"
            raise RouteError(message, param="lora.temperature")
        return GatedOptions(min(top_k, self._card.rows), temperature)

    def _refuse(self, options: RouterOptions) -> None:
        for field in ("score_mass", "min_score"):
            if getattr(options, field) is not None:
                what = f"router {self.name!r} decides token by token and has no scores, expected nothing"
                raise RouteError(f"lora.{field}: {what}", param=f"lora.{field}")
