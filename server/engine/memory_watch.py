"""Caches give way before the kernel kills: adapters in host memory, least recently used first, and idle grammars.

Below `LOW` of the memory that there is, so much of them is dropped that `HIGH` is free again; above `HIGH` they may
grow, by half of what is free beyond it, not sooner than `CALM_SECONDS` after they last shrank. What a request waits for
stays, and so does what lies on the device, where pins keep it: an adapter that was dropped is read again from disk.
"""

import ctypes
import logging
from collections.abc import Callable, Container

from adapters_store.tiers import HostTier
from server.engine.available_memory import MemoryReading
from server.engine.grammar_bank import GrammarBank

LOW, HIGH = 0.05, 0.10
MOST_LOW, MOST_HIGH = 1 << 30, 2 << 30
"""Shares of a large machine would be more than anybody needs."""
STALLED = 20.0
"""Percent of the time that something waited for memory, beyond which `HIGH` is what counts as low."""
LOOK_SECONDS = 1.0
CALM_SECONDS = 10.0

Read = Callable[[], MemoryReading | None]

logger = logging.getLogger(__name__)


class MemoryWatch:
    """Looks once a second, when it is asked to. `keep`: digests that the host tier must not drop."""

    def __init__(
        self,
        host: HostTier,
        keep: Container[str],
        grammars: GrammarBank | None,
        read: Read,
        clock: Callable[[], float],
    ) -> None:
        self._host = host
        self._keep = keep
        self._grammars = grammars
        self._read = read
        self._clock = clock
        self._most = host.budget_bytes
        self._next = 0.0
        self._calm = 0.0  # when it may grow again

    def look(self) -> None:
        """Shrink or grow, if it is time for a look."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + LOOK_SECONDS
        reading = self._read()
        if reading is None:
            return
        low, high = min(LOW * reading.total, MOST_LOW), min(HIGH * reading.total, MOST_HIGH)
        if reading.available < (high if reading.stalled > STALLED else low):
            self._calm = now + CALM_SECONDS
            self._shrink(int(high) - reading.available, reading)
        elif reading.available > high and self._host.budget_bytes < self._most and now >= self._calm:
            budget = self._host.budget_bytes + int(reading.available - high) // 2
            self._host.resize(min(self._most, budget), self._keep)
            if self._host.budget_bytes == self._most:
                logger.info("memory is free again: host memory for adapters is %d bytes, as it was", self._most)

    def _shrink(self, missing: int, reading: MemoryReading) -> None:
        before, budget = self._host.num_bytes, self._host.budget_bytes
        self._host.resize(max(0, min(budget, before - missing)), self._keep)
        dropped = before - self._host.num_bytes
        if self._grammars is not None:
            dropped += self._grammars.drop_idle()
        if not dropped and self._host.budget_bytes == budget:
            return  # there is nothing more to give
        self._host.counters.shrinks += 1
        _give_back()
        logger.warning(
            "memory is short: %d of %d bytes are left; %d bytes of caches were dropped, host memory for adapters is %d",
            reading.available,
            reading.total,
            dropped,
            self._host.budget_bytes,
        )


def _give_back() -> None:
    """glibc keeps what is freed, unless it is asked."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
