"""Faults that are put into a running server, one after the other, several of these rows at a time."""

import asyncio
import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from loadtests.soak.seen import Seen

Fault = Callable[[], Awaitable[str]]
"""Puts it in, waits until it is over, and says in a word or two how it went."""


@dataclass
class Report:
    """How often each fault was injected, by its outcome; and seconds from an engine's death to the next token."""

    outcomes: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    recoveries: list[float] = field(default_factory=list)

    @property
    def number(self) -> int:
        """Faults in all."""
        return sum(outcomes.total() for outcomes in self.outcomes.values())


class Injector:
    """One row of faults: each kind once in a random order, then at random by weight. Equal seeds give equal rows."""

    def __init__(self, kinds: Mapping[str, tuple[float, Fault]], report: Report, seen: Seen, seed: int) -> None:
        self._kinds = kinds
        self._report = report
        self._seen = seen
        self._rng = random.Random(seed)
        self._first = list(kinds)
        self._rng.shuffle(self._first)

    async def run(self, every: float, stop: asyncio.Event) -> None:
        """About one fault in `every` seconds, beside the time that they take, until `stop`; none is cut off.

        Between two there is at least as much time as the last one took, so that something is served also where an
        engine needs ten seconds to come back.
        """
        took = 0.0
        while not await _happens(stop, max(took, self._rng.uniform(0.5, 1.5) * every)):
            name, began, outcome = self._next(), time.monotonic(), "failed"
            with self._seen.telling(name):
                outcome = await self._kinds[name][1]()
            self._report.outcomes[name][outcome] += 1
            took = time.monotonic() - began

    def _next(self) -> str:
        if self._first:
            return self._first.pop()
        (name,) = self._rng.choices(list(self._kinds), [weight for weight, _ in self._kinds.values()])
        return name


async def _happens(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
