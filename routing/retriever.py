"""Adapters retrieved by the similarity of a prompt to their prototypes, after LoraRetriever (arXiv 2402.09997)."""

import hashlib
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from adapters_store.registry import Resolved
from adapters_store.store import AdapterStore
from adapters_store.types import Mix
from routing.candidates import allowed_candidates
from routing.encoder import Encoder, EncoderUnavailable
from routing.prototype_index import Hit, PrototypeIndex
from routing.route_cache import RouteCache
from routing.route_weights import mass_count, rounded, softmax
from routing.router import Outcome, Route, RoutedAdapter, RouteError, RouteQuery, Scored, compose
from routing.router_options import RouterOptions

LONGEST_TEXT = 1 << 17
"""Characters of a text that are looked at, more than encoders read: to hash and send 16 MB stopped the event loop for
50 to 80 ms."""

_MORE = 4
"""How many times more hits are looked at when some of the best are gone from the registry."""


@dataclass(frozen=True)
class RetrieverDefaults:
    """What options that are None mean. `min_score` is the encoder's calibrated one, `temperature` None equal weights.

    `mass_temperature` is that of the softmax which `score_mass` counts where no other is given.
    """

    top_k: int = 3
    min_score: float = -1.0
    temperature: float | None = None
    mass_temperature: float = 0.2


@dataclass(frozen=True)
class _Decision:
    """The chosen adapters, best first, and their weights; empty with the reason in `outcome`.

    `best` is the highest score of all candidates.
    """

    hits: tuple[Hit, ...]
    weights: tuple[float, ...]
    outcome: Outcome
    best: float | None


class Retriever:
    """The adapters whose prototypes are most similar to the prompt; a Router. `clock` counts seconds.

    Exact search over what the tenant may see, up to `top_k` adapters that score at least `min_score`, with weights 1/k
    or by softmax. A hit counts only if the registry too says that the tenant may use it. A text's decision is
    remembered until an adapter that the tenant sees comes or goes; if the query is sticky, as long as its adapters
    exist.
    """

    def __init__(
        self,
        name: str,
        encoder: Encoder,
        index: PrototypeIndex,
        store: AdapterStore,
        defaults: RetrieverDefaults,
        clock: Callable[[], float],
        cached_routes: int = 1024,
    ) -> None:
        self.name = name
        self._encoder = encoder
        self._index = index
        self._store = store
        self._defaults = defaults
        self._clock = clock
        self._cache: RouteCache[_Decision] = RouteCache(cached_routes)

    async def route(self, query: RouteQuery) -> Route:
        """The decision. Raises RouteError: `model_not_found` for a candidate that the tenant may not see,
        `router_unavailable` while the encoder fails, `invalid_value`; RegistryError.
        """
        started = self._clock()
        options = self._settle(query.options)
        allowed = await allowed_candidates(self._store, query.tenant, options.candidates)
        text = (query.text or "")[:LONGEST_TEXT].encode("utf-8", "replace").decode()
        if not text.strip():
            return self._route(query, started, [], Outcome.EMPTY_TEXT, scores=())
        if not self._index.count(query.tenant, allowed):
            return self._route(query, started, [], Outcome.NO_CANDIDATES, scores=())
        key = self._key(query.tenant, text, options)
        decision = self._cache.get(query.tenant, key)
        entries = None if decision is None else await self._entries(query.tenant, decision, allowed)
        cached = entries is not None
        vector = None if cached and not options.explain else await self._embed(text, query)
        if decision is None or entries is None:
            self._cache.drop(query.tenant, key)
            assert vector is not None
            decision, entries = await self._decide(query.tenant, vector, options, allowed)
            self._cache.put(query.tenant, key, decision)
        scores = None if vector is None or not options.explain else await self._scores(query.tenant, vector, allowed)
        return self._route(query, started, entries, decision.outcome, cached, scores, decision.best)

    def _settle(self, options: RouterOptions) -> RouterOptions:
        """The options with this router's defaults. Raises RouteError."""
        defaults = self._defaults
        top_k = defaults.top_k if options.top_k is None else options.top_k
        min_score = defaults.min_score if options.min_score is None else options.min_score
        temperature = defaults.temperature if options.temperature is None else options.temperature
        if top_k < 1:
            raise RouteError(f"lora.top_k: {top_k} is too small, expected at least 1", param="lora.top_k")
        if temperature is not None and not (temperature > 0 and math.isfinite(temperature)):
            message = f"lora.temperature: {temperature} is not allowed, expected a number above 0"
            raise RouteError(message, param="lora.temperature")
        if not math.isfinite(min_score):
            raise RouteError("lora.min_score: expected a finite number", param="lora.min_score")
        if options.score_mass is not None and not 0 < options.score_mass <= 1:
            message = f"lora.score_mass: {options.score_mass} is not allowed, expected a number above 0 and up to 1"
            raise RouteError(message, param="lora.score_mass")
        return replace(options, top_k=top_k, min_score=min_score, temperature=temperature)

    def _key(self, tenant: str, text: str, options: RouterOptions) -> Hashable:
        version = None if options.sticky else self._index.version(tenant)
        return hashlib.sha256(text.encode()).digest(), replace(options, explain=False), version

    async def _embed(self, text: str, query: RouteQuery) -> NDArray[np.float32]:
        try:
            vectors = np.asarray(await self._encoder.embed([text], tenant=query.tenant), np.float32)
            if vectors.shape != (1, self._index.width) or not np.isfinite(vectors).all():
                raise EncoderUnavailable("the encoder gives vectors that do not fit the adapters' prototypes")
        except EncoderUnavailable as error:
            param = "model" if query.router is None else "lora.router"
            message = f"{param}: router {self.name!r} is not available: {error}"
            raise RouteError(message, param=param, code="router_unavailable") from error
        return np.asarray(vectors[0], np.float32)

    async def _decide(
        self, tenant: str, vector: NDArray[np.float32], options: RouterOptions, allowed: Mapping[str, Resolved] | None
    ) -> tuple[_Decision, list[RoutedAdapter]]:
        assert options.top_k is not None
        assert options.min_score is not None
        wanted = options.top_k
        while True:
            hits = self._index.top(tenant, vector, wanted, allowed)
            good = [hit for hit in hits if hit.score >= options.min_score]
            found = await self._meanings(tenant, good, allowed)
            usable = [hit for hit in good if hit in found]
            if len(usable) >= options.top_k or len(good) < wanted:
                break
            wanted *= _MORE
        best = hits[0].score if hits else None
        if not usable:
            outcome = Outcome.BELOW_MIN_SCORE if hits and not good else Outcome.NO_CANDIDATES
            return _Decision((), (), outcome, best), []
        chosen = self._weigh(usable[: options.top_k], options)
        used, weights = tuple(hit for hit, _ in chosen), tuple(weight for _, weight in chosen)
        decision = _Decision(used, weights, Outcome.ROUTED, best)
        return decision, [RoutedAdapter(found[hit], weight, hit.score) for hit, weight in chosen]

    def _weigh(self, hits: Sequence[Hit], options: RouterOptions) -> list[tuple[Hit, float]]:
        scores = [hit.score for hit in hits]
        if options.score_mass is not None:
            shares = softmax(scores, options.temperature or self._defaults.mass_temperature)
            hits = hits[: mass_count(shares, options.score_mass)]
        if options.temperature is None:
            return [(hit, 1.0 / len(hits)) for hit in hits]
        weights = rounded(softmax([hit.score for hit in hits], options.temperature))
        return [(hit, weight) for hit, weight in zip(hits, weights, strict=True) if weight]

    async def _meanings(
        self, tenant: str, hits: Iterable[Hit], allowed: Mapping[str, Resolved] | None
    ) -> dict[Hit, Resolved]:
        """What the hits mean now; those that are gone, or whose name is another's adapter, are absent."""
        hits = list(hits)
        found = allowed
        if found is None:
            found = await self._store.resolve(tenant, [hit.name for hit in hits]) if hits else {}
        return {hit: found[hit.name] for hit in hits if hit.name in found and found[hit.name].tenant == hit.owner}

    async def _entries(
        self, tenant: str, decision: _Decision, allowed: Mapping[str, Resolved] | None
    ) -> list[RoutedAdapter] | None:
        """A remembered decision's adapters, None if one of them is gone."""
        found = await self._meanings(tenant, decision.hits, allowed)
        if len(found) < len(decision.hits):
            return None
        pairs = zip(decision.hits, decision.weights, strict=True)
        return [RoutedAdapter(found[hit], weight, hit.score) for hit, weight in pairs]

    async def _scores(
        self, tenant: str, vector: NDArray[np.float32], allowed: Mapping[str, Resolved] | None
    ) -> tuple[Scored, ...]:
        """Every candidate's score, best first. Others' adapters are shown only if the registry says they are public."""
        hits = self._index.search(tenant, vector, allowed)
        found = await self._meanings(tenant, [hit for hit in hits if hit.owner != tenant], allowed)
        return tuple(Scored(hit.name, hit.score) for hit in hits if hit.owner == tenant or hit in found)

    def _route(
        self,
        query: RouteQuery,
        started: float,
        entries: list[RoutedAdapter],
        outcome: Outcome,
        cached: bool = False,
        scores: tuple[Scored, ...] | None = None,
        best: float | None = None,
    ) -> Route:
        entries = compose(entries, query.composition)
        mix = Mix.of([(entry.digest, entry.weight) for entry in entries], query.composition)
        return Route(
            router=self.name,
            adapters=tuple(entries),
            composition=query.composition,
            mix=mix,
            seconds=self._clock() - started,
            cached=cached,
            outcome=outcome,
            best=best,
            scores=scores if query.options.explain else None,
        )
