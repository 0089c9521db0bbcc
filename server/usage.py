"""Who used what: counted in memory, written to the registry's ledger every few seconds."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime

from adapters_store.registry import Registry, UsageRow, Use
from adapters_store.threads import Threads
from routing.router import Route

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 5.0
READ_SECONDS = 1.0
"""Between two writes for those who read, however many they are."""


@dataclass
class _Counts:
    requests: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


@dataclass
class _Uses:
    requests: int = 0
    last_used: float = 0.0


_Lines = dict[tuple[str, str, date], _Counts]  # by tenant, adapter, day
_Touched = dict[tuple[str, str, str], _Uses]  # by tenant, owner, name


class UsageLedger:
    """Counts requests and tokens by tenant, mix of adapters and day (UTC), and the uses of each adapter.

    Counting never waits. What cannot be written stays and is written later. A batch whose writing failed is sent again
    as it is, by the same number: a database that dies while it commits may have taken it. `clock` gives seconds since
    the epoch, `writer` is a name that no other process has.
    """

    def __init__(self, registry: Registry, clock: Callable[[], float], writer: str) -> None:
        self._registry = registry
        self._clock = clock
        self._writer = writer
        self._batch: list[UsageRow] = []  # sent, and not known to have been taken
        self._number = 0
        self._lines: _Lines = {}
        self._touched: _Touched = {}
        self._flushing = asyncio.Lock()
        self._catching_up: asyncio.Task[None] | None = None  # has not begun to write
        self._next_read = 0.0  # by the event loop's clock
        self._is_failing = False
        self._thread = Threads(1, "usage")
        self.on_use: Callable[[str, str, str], None] | None = None
        """Called with (tenant, owner, name) of every adapter that a request has used."""

    def count(self, tenant: str, route: Route, prompt_tokens: int, generation_tokens: int) -> None:
        """One request that has ended."""
        now = self._clock()
        self._add(tenant, route.label if route.adapters else "", now, prompt_tokens, generation_tokens)
        for owner, name in {(each.owner, each.name) for each in route.adapters}:
            uses = self._touched.setdefault((tenant, owner, name), _Uses())
            uses.requests += 1
            uses.last_used = max(uses.last_used, now)
            if self.on_use is not None:
                self.on_use(tenant, owner, name)

    def count_embeddings(self, tenant: str, model: str, tokens: int) -> None:
        """One request to the embedding model, whose name no adapter has."""
        self._add(tenant, model, self._clock(), tokens, 0)

    async def flush(self) -> bool:
        """Write what has been counted; whether it worked."""
        async with self._flushing:
            lines, touched = await self._flush_lines(), await self._flush_touched()
        return lines and touched

    async def catch_up(self) -> None:
        """For readers: what has been counted up to now is written, at most once a second, or cannot be."""
        if not (self._batch or self._lines or self._touched or self._flushing.locked()):
            return
        if self._catching_up is None:
            self._catching_up = asyncio.create_task(self._catch_up())
        await asyncio.shield(self._catching_up)

    async def close(self, attempts: int = 3, pause: float = 1.0) -> None:
        """Write the rest, trying `attempts` times, `pause` seconds apart."""
        for attempt in range(attempts):
            if attempt:
                await asyncio.sleep(pause)
            if await self.flush():
                await self._write(lambda: self._registry.ledger.leave(self._writer))
                break
        else:
            unsent = [line.requests for line in self._lines.values()]
            lost = sum(unsent) + sum(row.requests for row in self._batch)
            logger.error("the registry is unavailable: %d requests are missing in the ledger", lost)
        self._thread.shutdown(wait=False)

    def _add(self, tenant: str, label: str, now: float, prompt_tokens: int, generation_tokens: int) -> None:
        line = self._lines.setdefault((tenant, label, datetime.fromtimestamp(now, UTC).date()), _Counts())
        line.requests += 1
        line.prompt_tokens += prompt_tokens
        line.generation_tokens += generation_tokens

    async def _catch_up(self) -> None:
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(max(0.0, self._next_read - clock()))
        self._next_read = clock() + READ_SECONDS
        self._catching_up = None  # who comes now may know of what is not in this write
        await self.flush()

    async def _flush_lines(self) -> bool:
        if self._batch and not await self._send_batch():
            return False
        lines, self._lines = self._lines, {}
        if not lines:
            return True
        self._number += 1
        self._batch = [
            UsageRow(tenant, adapter, day, counts.requests, counts.prompt_tokens, counts.generation_tokens)
            for (tenant, adapter, day), counts in lines.items()
        ]
        return await self._send_batch()

    async def _send_batch(self) -> bool:
        is_taken = await self._write(lambda: self._registry.ledger.add(self._batch, self._writer, self._number))
        if is_taken:
            self._batch = []
        return is_taken

    async def _flush_touched(self) -> bool:
        touched, self._touched = self._touched, {}
        batch = [Use(*key, uses.requests, uses.last_used) for key, uses in touched.items()]
        if not batch or await self._write(lambda: self._registry.uses.touch(batch)):
            return True
        for key, uses in touched.items():
            newer = self._touched.setdefault(key, _Uses())
            newer.requests += uses.requests
            newer.last_used = max(newer.last_used, uses.last_used)
        return False

    async def _write(self, write: Callable[[], None]) -> bool:
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, write)
        except Exception as error:  # whatever it is, what was counted must not be lost with it
            if not self._is_failing:
                logger.warning("usage cannot be written and is kept: %s", error, exc_info=error)
            self._is_failing = True
            return False
        self._is_failing = False
        return True
