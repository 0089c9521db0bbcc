"""Which of several engines takes a request: where its adapters and its prompt's KV are, but never far above the others.

Decides by what it is told, and does no input or output.
"""

import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from server.engine.prefixes import Prefixes, PrefixTable, prompt_prefixes
from server.engine.sequence import Request

IMBALANCE = 1.25
"""An engine whose load is above this many times the mean takes no request (bounded loads: Mirrokni et al., 2018)."""
SLACK = 8
"""So many more requests than the least loaded engine it may have all the same: the batch of an engine that does little
grows almost for free, and reading an adapter once more does not."""
DISK_TOKENS = 1000
HOST_TOKENS = 20
EVICTION_TOKENS = 5
"""What an adapter costs that is not on the device, in prompt tokens that could be computed instead.

A rank-16 adapter of an 8B model is 84 MB: 1.7 ms from host memory on an H200, which is a prompt of 20 tokens, and some
50 ms from a disk. Where no page is free it drives another one out.
"""


@dataclass(frozen=True)
class Wanted:
    """What a request would find well near: its adapters by digest, and beginnings of its prompt."""

    digests: tuple[str, ...] = ()
    prefixes: Prefixes = ()

    @classmethod
    def by(cls, request: Request) -> "Wanted":
        digests = tuple(digest for digest, _ in request.mix.entries)
        router = request.prompt_router.key if request.prompt_router is not None else b""
        return cls(digests, prompt_prefixes(request.cache_root + router, request.prompt))


class _Seen:
    """What is known of one engine."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.reported = 0
        self.is_full = False
        self.pins = 0
        self.tiers: dict[str, str] = {}
        self.using: Counter[str] = Counter()

    @property
    def load(self) -> int:
        """Requests: those placed here and not ended, or as many as it says, which others may have placed."""
        return max(self.in_flight, self.reported)

    def cost(self, digest: str) -> int:
        """Prompt tokens' worth of bringing an adapter to the device. What a request in flight uses is on its way."""
        tier = "device" if digest in self.using else self.tiers.get(digest, "disk")
        if tier == "device":
            return 0
        return (HOST_TOKENS if tier == "host" else DISK_TOKENS) + EVICTION_TOKENS * self.is_full


class Placement:
    """Places requests on engines 0 to `engines` - 1.

    Among the engines whose load is in bounds (`limit`) those come first where a request costs least to begin: adapters
    to be brought, tokens of its prompt to be computed. Of several such engines two are drawn, and the less loaded one
    takes it (the power of two choices: Mitzenmacher, 2001): drawn, since whoever else places requests on them would
    find the same one the least loaded.
    """

    def __init__(self, engines: int, draw: random.Random, slack: int = SLACK, prefix_cache: bool = True) -> None:
        """`prefix_cache`: whether engines keep the KV of beginnings of prompts."""
        self._keeps_prefixes = prefix_cache
        self._seen = [_Seen() for _ in range(engines)]
        self._draw = draw
        self._slack = slack
        self._prefixes = PrefixTable()

    def load(self, engine: int) -> int:
        """Requests that the engine has."""
        return self._seen[engine].load

    def limit(self, candidates: Collection[int]) -> int:
        """The largest load with which one of these engines may be given one more request."""
        loads = [self.load(engine) for engine in candidates]
        return max(min(loads) + self._slack, int(IMBALANCE * sum(loads) / len(loads)))

    def choose(self, wanted: Wanted, candidates: Sequence[int]) -> int:
        """One of these engines, of which there must be at least one."""
        limit = self.limit(candidates)
        costs = {engine: self.cost(wanted, engine) for engine in candidates if self.load(engine) <= limit}
        cheapest = min(costs.values())
        best = [engine for engine, cost in costs.items() if cost == cheapest]
        return min(self._draw.sample(best, min(2, len(best))), key=self.load)

    def cost(self, wanted: Wanted, engine: int) -> int:
        """What a request costs there before its first token, in prompt tokens, up to a constant."""
        seen = self._seen[engine]
        return sum(map(seen.cost, wanted.digests)) - self._prefixes.cached(wanted.prefixes, engine)

    def begin(self, wanted: Wanted, engine: int) -> None:
        """The engine is given the request."""
        seen = self._seen[engine]
        seen.in_flight += 1
        seen.using.update(wanted.digests)
        if self._keeps_prefixes:
            self._prefixes.add(wanted.prefixes, engine)

    def end(self, wanted: Wanted, engine: int) -> None:
        """The engine has the request no longer."""
        seen = self._seen[engine]
        seen.in_flight -= 1
        for digest in wanted.digests:
            seen.using[digest] -= 1
            if not seen.using[digest]:
                del seen.using[digest]

    def moved(self, engine: int, digest: str, tier: str) -> None:
        """An adapter is in another tier of the engine."""
        if tier == "disk":
            self._seen[engine].tiers.pop(digest, None)
        else:
            self._seen[engine].tiers[digest] = tier

    def reported(self, engine: int, requests: int, free_pages: int) -> None:
        """What the engine says of itself."""
        seen = self._seen[engine]
        seen.reported, seen.is_full = requests, not free_pages

    def lost(self, engine: int) -> None:
        """The engine has died, and what it had in memory is gone."""
        seen = self._seen[engine]
        seen.reported, seen.is_full = 0, False
        seen.tiers.clear()
        self._prefixes.forget(engine)
