"""A pool of scripted engines."""

import asyncio
import random

from polling import until
from scripted import ScriptedMember

from adapters_store.types import Mix
from server.engine.placement import Placement
from server.engine.pool import EnginePool
from server.engine.sequence import Output, Request, SamplingParams
from server.engine.suspects import Suspects

PARAMS = SamplingParams(max_tokens=4)


class Engines:
    """A pool of scripted engines, and requests that run in it."""

    def __init__(self, count: int = 2) -> None:
        self.suspects = Suspects()
        self.members = [ScriptedMember(self.suspects) for _ in range(count)]
        self.pool = EnginePool(self.members, Placement(count, random.Random(1)), self.suspects)
        self.moves = 0
        self.pool.on_move = self._count

    def _count(self) -> None:
        self.moves += 1

    def ask(
        self, name: str, *, digest: str | None = None, timeout: float | None = None
    ) -> "asyncio.Task[list[Output]]":
        mix = Mix.of([(digest, 1.0)]) if digest is not None else Mix.of([])
        paths = {digest: "path"} if digest is not None else {}
        prompt = tuple(name.encode())
        return self.send(Request(name, prompt, PARAMS, mix, paths, timeout=timeout))

    def send(self, request: Request) -> "asyncio.Task[list[Output]]":
        async def collect() -> list[Output]:
            return [output async for output in self.pool.submit(request)]

        return asyncio.create_task(collect())

    async def where(self, name: str, besides: ScriptedMember | None = None) -> ScriptedMember:
        """The engine that has the request, as soon as one has."""
        await until(lambda: any(name in member.requests for member in self.members if member is not besides))
        return next(member for member in self.members if name in member.requests and member is not besides)

    def other(self, member: ScriptedMember) -> ScriptedMember:
        return next(each for each in self.members if each is not member)
