"""Several engines behind the interface of one: requests are placed, and move if their engine dies before it answers."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from itertools import islice
from typing import Protocol

from server.engine.adapter_calls import EngineUnavailable
from server.engine.client import EngineClient
from server.engine.config import EngineConfig, EngineInfo, EngineStats
from server.engine.journey import CLEARED_TOKENS, Journey
from server.engine.placement import Placement, Wanted
from server.engine.sequence import ENGINE_LOST, FinishReason, Output, Request
from server.engine.suspects import Quarantined, Suspects, Suspicion

TIERS = ("disk", "host", "device")
MOST_MOVES = 1


class Member(Protocol):
    """One engine's client, as `EngineClient` is."""

    on_stats: Callable[[EngineStats], None] | None
    on_residency: Callable[[str, str], None] | None

    @property
    def info(self) -> EngineInfo | None: ...
    @property
    def alive(self) -> bool: ...
    @property
    def stalled(self) -> bool: ...
    @property
    def stats(self) -> EngineStats: ...

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    def submit(self, request: Request) -> AsyncGenerator[Output, None]: ...
    def abort(self, request_id: str) -> None: ...
    async def pin(self, digest: str, path: str) -> bool: ...
    def unpin(self, digest: str) -> None: ...
    async def prefetch_now(self, digest: str, path: str) -> str: ...
    def prefetch(self, paths: Mapping[str, str]) -> None: ...
    def evict(self, digest: str) -> None: ...


class EnginePool:
    """Engines of one model, whose clients share `suspects`.

    A request whose engine dies before its first token is placed once more; one that has tokens ends with an error, as
    it does with a single engine. `on_stats` is told an engine's number with its snapshot, `on_residency` the nearest
    tier that an adapter has in any engine, when that changes, `on_move` of each request that moves.
    """

    def __init__(self, members: Sequence[Member], placement: Placement, suspects: Suspicion) -> None:
        self.members = tuple(members)
        self.on_stats: Callable[[int, EngineStats], None] | None = None
        self.on_residency: Callable[[str, str], None] | None = None
        self.on_move: Callable[[], None] | None = None
        self._placement = placement
        self._suspects = suspects
        self._placed: dict[str, int] = {}
        self._tiers: dict[str, list[str]] = {}
        self._pins: dict[str, int] = {}
        self._stopping = False
        for number, member in enumerate(self.members):
            member.on_stats = partial(self._reported, number)
            member.on_residency = partial(self._moved, number)

    @classmethod
    def of(cls, configs: Sequence[EngineConfig], stall_seconds: float, draw: random.Random) -> "EnginePool":
        """A pool of engine processes."""
        suspects = Suspects()
        members = [EngineClient(config, stall_seconds, suspects) for config in configs]
        return cls(members, Placement(len(members), draw, prefix_cache=configs[0].prefix_cache), suspects)

    @property
    def info(self) -> EngineInfo | None:
        """What the front end needs to know, which is the same of all."""
        return next((member.info for member in self.members if member.info is not None), None)

    @property
    def alive(self) -> bool:
        """Whether any engine takes requests."""
        return any(member.alive for member in self.members)

    async def start(self) -> None:
        """Start all engines at once. Raises EngineStartError if one cannot; `stop` is still to be called."""
        try:
            async with asyncio.TaskGroup() as group:
                for member in self.members:
                    group.create_task(member.start())
        except ExceptionGroup as failed:  # the first failure; the others were told to stop for its sake
            raise failed.exceptions[0] from None

    async def stop(self) -> None:
        """End all processes; requests in flight end with an error."""
        self._stopping = True
        await asyncio.gather(*(member.stop() for member in self.members))

    async def submit(self, request: Request) -> AsyncGenerator[Output, None]:
        """As `EngineClient.submit`. Parts of a prompt's answer come with its first token: until then an engine that
        dies may take them with it.
        """
        journey = Journey(request, asyncio.get_running_loop().time)
        while True:
            async with aclosing(self._place(journey)) as outputs:
                async for output in outputs:
                    if output.error_code == ENGINE_LOST and self._may_move(journey):
                        break
                    for each in journey.take(output):
                        yield each
                    if journey.moves and journey.num_tokens >= CLEARED_TOKENS:
                        self._suspects.cleared(request)
                else:
                    return
            if not journey.move():
                yield Output(request.id, finish_reason=FinishReason.TIMEOUT)
                return
            if self.on_move is not None:
                self.on_move()

    async def _place(self, journey: Journey) -> AsyncGenerator[Output, None]:
        """Outputs of one engine. Raises EngineUnavailable when none lives."""
        while True:
            number = self._placement.choose(journey.wanted, self._candidates())
            self._placement.begin(journey.wanted, number)
            self._placed[journey.request.id] = number
            try:
                async with aclosing(self.members[number].submit(journey.request)) as outputs:
                    async for output in outputs:
                        yield output
                    return
            except EngineUnavailable:  # it died while the request waited for its turn
                continue
            finally:
                self._placement.end(journey.wanted, number)
                del self._placed[journey.request.id]

    def abort(self, request_id: str) -> None:
        """As `EngineClient.abort`."""
        number = self._placed.get(request_id)
        if number is not None:
            self.members[number].abort(request_id)

    async def pin(self, digest: str, path: str) -> bool:
        """As `EngineClient.pin`, in the engine with the fewest pins that has room, first where the adapter is."""
        if digest in self._pins:
            return await self.members[self._pins[digest]].pin(digest, path)
        pins, wanted = Counter(self._pins.values()), Wanted((digest,))
        for number in sorted(self._candidates(), key=lambda each: (pins[each], self._placement.cost(wanted, each))):
            if await self.members[number].pin(digest, path):
                self._pins[digest] = number
                return True
        return False

    def unpin(self, digest: str) -> None:
        """Let a pinned adapter be evicted like others."""
        number = self._pins.pop(digest, None)
        if number is not None:
            self.members[number].unpin(digest)

    async def prefetch_now(self, digest: str, path: str) -> str:
        """As `EngineClient.prefetch_now`, in the engine that a request for the adapter would get."""
        number = self._placement.choose(Wanted((digest,)), self._candidates())
        return await self.members[number].prefetch_now(digest, path)

    def prefetch(self, paths: Mapping[str, str]) -> None:
        """Have these adapters read into host memory in idle time, each into that of one engine."""
        for number, member in enumerate(self.members):
            member.prefetch(dict(islice(paths.items(), number, None, len(self.members))))

    def evict(self, digest: str) -> None:
        """As `EngineClient.evict`, in every engine."""
        for member in self.members:
            member.evict(digest)

    def _candidates(self) -> list[int]:
        """Engines that may be given work: those that live, without stuck ones as long as there are others."""
        living = [number for number, member in enumerate(self.members) if member.alive]
        if not living:
            raise EngineUnavailable("no inference engine is running, they are being restarted")
        return [number for number in living if not self.members[number].stalled] or living

    def _may_move(self, journey: Journey) -> bool:
        """Whether a request whose engine died may be given to another one. Raises Quarantined if it had two."""
        if journey.num_tokens or self._stopping:
            return False
        if self._suspects.is_convicted(journey.request):
            raise Quarantined
        return journey.moves < MOST_MOVES and self.alive

    def _reported(self, number: int, stats: EngineStats) -> None:
        if self.members[number].alive:
            self._placement.reported(number, stats.running + stats.waiting, stats.pages.get("free", 1))
        else:
            self._placement.lost(number)
        if self.on_stats is not None:
            self.on_stats(number, stats)

    def _moved(self, number: int, digest: str, tier: str) -> None:
        self._placement.moved(number, digest, tier)
        tiers = self._tiers.setdefault(digest, ["disk"] * len(self.members))
        before = max(tiers, key=TIERS.index)
        tiers[number] = tier
        now = max(tiers, key=TIERS.index)
        if now == "disk":
            del self._tiers[digest]
        if now != before and self.on_residency is not None:
            self.on_residency(digest, now)
