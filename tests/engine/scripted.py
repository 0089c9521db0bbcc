"""An engine's client whose outputs and death are what a test says."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing

from server.engine.adapter_calls import EngineUnavailable
from server.engine.config import EngineInfo, EngineStats
from server.engine.engine_process import EngineStartError
from server.engine.sequence import ENGINE_LOST, FinishReason, Output, Request
from server.engine.suspects import Suspects

INFO = EngineInfo("f" * 64, 256, 64, 16, {"qkv": 8}, 512, (1,), "cpu", "float32", {})


class ScriptedMember:
    """Requests stay open until the test says what comes: `say`, `finish`, `die`. Admits suspects as a client does."""

    def __init__(self, suspects: Suspects) -> None:
        self.info: EngineInfo | None = INFO
        self.alive = True
        self.stalled = False
        self.stats = EngineStats()
        self.on_stats: Callable[[EngineStats], None] | None = None
        self.on_residency: Callable[[str, str], None] | None = None
        self.requests: dict[str, Request] = {}
        self.aborted: list[str] = []
        self.pinned: dict[str, str] = {}
        self.most_pins = 2
        self.ahead: dict[str, str] = {}
        self.prefetched: list[str] = []
        self.evicted: list[str] = []
        self.start_error: str | None = None
        self.may_stop = asyncio.Event()
        self.may_stop.set()
        self.is_deaf = False  # it is sent requests and never looks at them
        self._streams: dict[str, asyncio.Queue[Output]] = {}
        self._suspects = suspects

    async def start(self) -> None:
        if self.start_error is not None:
            raise EngineStartError(self.start_error)

    async def stop(self) -> None:
        await self.may_stop.wait()
        self.die()

    async def submit(self, request: Request) -> AsyncGenerator[Output, None]:
        async with self._suspects.admitted(request), aclosing(self._submit(request)) as outputs:
            async for output in outputs:
                yield output

    async def _submit(self, request: Request) -> AsyncGenerator[Output, None]:
        if not self.alive:
            raise EngineUnavailable("it is down")
        stream = self._streams[request.id] = asyncio.Queue()
        self.requests[request.id] = request
        try:
            while True:
                output = await stream.get()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self._streams.pop(request.id, None)
            self.requests.pop(request.id, None)

    def say(self, request_id: str, token: int = 5) -> None:
        self.put(Output(request_id, (token,)))

    def finish(self, request_id: str) -> None:
        self.put(Output(request_id, (9,), finish_reason=FinishReason.LENGTH))

    def put(self, output: Output) -> None:
        self._streams[output.request_id].put_nowait(output)

    def is_delivered(self, request_id: str) -> bool:
        """Whether all that was said has been taken."""
        return self._streams[request_id].empty()

    def die(self) -> None:
        """As a killed process: its requests are suspects, and end."""
        self.alive = False
        self._suspects.crashed(() if self.is_deaf else self.requests.values())
        for request_id, stream in self._streams.items():
            stream.put_nowait(
                Output(request_id, finish_reason=FinishReason.ERROR, error="died", error_code=ENGINE_LOST)
            )
        if self.on_stats is not None:
            self.on_stats(EngineStats())

    def report(self, stats: EngineStats) -> None:
        assert self.on_stats is not None
        self.on_stats(stats)

    def move(self, digest: str, tier: str) -> None:
        assert self.on_residency is not None
        self.on_residency(digest, tier)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    async def pin(self, digest: str, path: str) -> bool:
        if not self.alive:
            raise EngineUnavailable("it is down")
        if digest not in self.pinned and len(self.pinned) >= self.most_pins:
            return False
        self.pinned[digest] = path
        return True

    def unpin(self, digest: str) -> None:
        self.pinned.pop(digest, None)

    async def prefetch_now(self, digest: str, path: str) -> str:  # noqa: ARG002
        self.prefetched.append(digest)
        return "device"

    def prefetch(self, paths: Mapping[str, str]) -> None:
        self.ahead |= paths

    def evict(self, digest: str) -> None:
        self.evicted.append(digest)
