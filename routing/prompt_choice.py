"""Routers that decide for a whole prompt inside the model: what a request brings along for one to choose from."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapters_store.registry import Resolved
from adapters_store.store import AdapterStore
from adapters_store.types import TARGETS, Composition, Mix
from routing.candidates import usable
from routing.prompt_folder import PromptCard
from routing.prompt_router import MODULES
from routing.router import Outcome, Route, RoutedAdapter, RouteError, RouteQuery
from server.engine.prompt_routers import PromptUse

HIDDEN = ""
"""Stands for an expert that the tenant may not use."""


@dataclass(frozen=True)
class PromptLevelRouter:
    """A MiLoRA or MoA router: every adapter of its card that the tenant may use comes along, and the engine decides.

    An adapter is used with the very weights that the router was trained for; see `routing.candidates.usable`. `folder`
    holds the router, `clock` counts seconds.
    """

    name: str
    card: PromptCard
    folder: Path
    store: AdapterStore
    clock: Callable[[], float]

    @property
    def trained_with(self) -> str | None:
        """Digest of the adapter whose linears are chosen, and which is not meant to be used without this router."""
        return self.card.adapters[0].digest if self.card.form.experts == MODULES else None

    async def route(self, query: RouteQuery) -> Route:
        """What may be chosen. Raises RouteError: `model_not_found` for a candidate that the tenant may not see,
        `invalid_value` for options that do not apply; RegistryError.
        """
        started = self.clock()
        top_k = self._top_k(query)
        found = await usable(self.store, query, self.card.adapters)
        adapters = {each.digest: RoutedAdapter(each, 1.0) for each in found if each is not None}
        if not adapters:
            none = Outcome.NO_CANDIDATES
            return Route(self.name, (), query.composition, Mix(), self.clock() - started, outcome=none)
        rows = tuple(None if each is None else each.digest for each in found)
        use = PromptUse(self._digest, str(self.folder), rows, self.card.form.layered, top_k)
        mix = Mix(tuple((digest, 1.0) for digest in sorted(adapters)))
        return Route(
            self.name,
            tuple(adapters.values()),
            query.composition,
            mix,
            self.clock() - started,
            prompt_router=use,
            experts=self._experts(found),
        )

    @property
    def _digest(self) -> str:
        """Of the tensors and what the card makes of them."""
        card = self.card
        parts = [card.sha256, repr(card.form), repr(card.has_null), *(adapter.digest for adapter in card.adapters)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _experts(self, found: list[Resolved | None]) -> tuple[str | None, ...]:
        if self.card.form.experts == MODULES:
            return TARGETS
        names = tuple(HIDDEN if each is None else each.name for each in found)
        return (*names, None) if self.card.has_null else names

    def _top_k(self, query: RouteQuery) -> int:
        for field in ("temperature", "score_mass", "min_score"):
            if getattr(query.options, field) is not None:
                what = f"router {self.name!r} takes its experts as they are, expected nothing"
                raise RouteError(f"lora.{field}: {what}", param=f"lora.{field}")
        if query.composition is not Composition.MIXTURE:
            what = f"router {self.name!r} adds up what it chooses, expected 'mixture'"
            raise RouteError(f"lora.composition: {what}", param="lora.composition")
        top_k = self.card.form.top_k if query.options.top_k is None else query.options.top_k
        if top_k < 1:
            raise RouteError(f"lora.top_k: {top_k} is too small, expected at least 1", param="lora.top_k")
        return min(top_k, self.card.form.num_experts)
