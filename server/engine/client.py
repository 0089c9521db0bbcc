"""The front end's side of an engine process: start it, talk to it, and start it again when it dies."""

import asyncio
import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

import zmq
import zmq.asyncio

from server.engine.adapter_calls import AdapterCalls
from server.engine.adapter_calls import EngineUnavailable as EngineUnavailable
from server.engine.backoff import Backoff
from server.engine.config import EngineConfig, EngineInfo, EngineStats, RequestError
from server.engine.messages import (
    Abort,
    FromEngine,
    Ready,
    Shutdown,
    Start,
    StartFailed,
    Submit,
    ToEngine,
    Update,
    decode_from_engine,
    encode,
)
from server.engine.sequence import FinishReason, Output, Request
from server.engine.suspects import Suspects

SHUTDOWN_SECONDS = 5.0
STALL_SECONDS = 60.0
"""An engine that works reports four times a second; a step that compiles kernels may take half a minute."""
OPENMP = {"GOMP_SPINCOUNT": "10000"}
"""How long threads of the CPU backend spin at a barrier before they sleep, unless the environment says otherwise.

One decode step of 8 rows on 2 cores, SmolLM2-135M: 84 ms with this, 124 ms without spinning. libgomp's default spins
for milliseconds, which is no faster on an idle machine and made the step take 1.7 s beside another busy process.
"""


logger = logging.getLogger(__name__)


class EngineStartError(RuntimeError):
    """The engine could not be started. The message is one sentence."""


class EngineClient(AdapterCalls):
    """One engine process. When it dies, requests in flight end with an error each, and it is started again.

    `program`: the module that it runs, and arguments before the address.
    """

    def __init__(self, config: EngineConfig, stall_seconds: float = STALL_SECONDS) -> None:
        """`stall_seconds`: a process that is silent so long with requests in flight counts as stuck, and is ended when
        it has been for twice that time.
        """
        super().__init__()
        self.config = config
        self.program: tuple[str, ...] = ("server.engine.loop",)
        self.stall_seconds = stall_seconds
        self.info: EngineInfo | None = None
        self.restarts = 0
        self.stats = EngineStats()
        self.on_stats: Callable[[EngineStats], None] | None = None
        self._streams: dict[str, asyncio.Queue[Output | RequestError]] = {}
        self._requests: dict[str, Request] = {}
        self._suspects = Suspects()
        self._heard = 0.0
        self._has_answered = False
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Process id of the engine, or None when none lives."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def stalled(self) -> bool:
        """Whether a step seems to be stuck: there is work, and nothing has been heard of it for too long."""
        return self._silent_for > self.stall_seconds

    async def start(self) -> None:
        """Spawn the process and wait until the model is loaded. Raises EngineStartError."""
        await self._spawn()
        self._supervisor = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """End the process; requests in flight end with an error."""
        self._stopping = True
        if self.alive and self._process is not None:
            self._send(Shutdown())
            await self._reap(self._process)
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._lost("the server is shutting down")
        self._context.destroy(linger=0)

    async def submit(self, request: Request) -> AsyncGenerator[Output, None]:
        """Outputs of the request as they come; the last has a finish reason.

        Closing the generator early aborts the request. A request that was in flight when an engine died is tried once
        more, while no other such request is. Raises RequestError for what the engine refuses, and for a request that
        an engine died of twice; EngineUnavailable when no engine lives.
        """
        async with self._suspects.admitted(request), aclosing(self._submit(request)) as outputs:
            async for output in outputs:
                yield output

    async def _submit(self, request: Request) -> AsyncGenerator[Output, None]:
        if not self.alive:
            raise EngineUnavailable("the inference engine is not running, it is being restarted")
        stream: asyncio.Queue[Output | RequestError] = asyncio.Queue()
        if not self._streams:
            self._heard = asyncio.get_running_loop().time()  # before it had nothing to say
        self._streams[request.id], self._requests[request.id] = stream, request
        ended = False
        try:
            self._send(Submit(request))
            while not ended:
                item = await stream.get()
                ended = isinstance(item, RequestError) or item.finish_reason is not None
                if isinstance(item, RequestError):
                    raise item
                if item.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                    self._suspects.cleared(request)
                    self._has_answered = True
                yield item
        finally:
            self._streams.pop(request.id, None)
            self._requests.pop(request.id, None)
            if not ended:
                self.abort(request.id)

    def abort(self, request_id: str) -> None:
        """End a request; its stream, if somebody still reads it, gets its ending."""
        if self.alive:
            self._send(Abort(request_id))

    async def _spawn(self) -> None:
        with tempfile.TemporaryDirectory(prefix="loramux-") as folder:  # mode 0700: nobody else can connect
            address = f"ipc://{Path(folder) / 'engine'}"
            self._socket = self._context.socket(zmq.PAIR)
            self._socket.set_hwm(0)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.bind(address)
            # -P: whoever starts the server in a folder with a package `server` of its own gets ours all the same.
            command = (sys.executable, "-P", "-m", *self.program, address, str(os.getpid()))
            process = None
            try:
                process = await asyncio.create_subprocess_exec(*command, env=OPENMP | os.environ)
                self._send(Start(self.config))
                self.info = await self._handshake(process)
            except BaseException:
                if process is not None:
                    process.kill()
                    await process.wait()
                self._socket.close()
                raise
            self._process = process
        self.alive, self._has_answered = True, False
        self._engine_started()

    async def _handshake(self, process: asyncio.subprocess.Process) -> EngineInfo:
        first = asyncio.ensure_future(self._receive())
        exited = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait((first, exited), return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                await asyncio.wait((first,), timeout=0.5)  # the last words of a process may arrive after its end
            if not first.done():
                raise EngineStartError(f"the engine process ended with code {process.returncode} while it was starting")
            message = first.result()
        finally:
            first.cancel()
            exited.cancel()
        if isinstance(message, StartFailed):
            raise EngineStartError(message.message)
        assert isinstance(message, Ready)
        return message.info

    async def _supervise(self) -> None:
        backoff = Backoff()
        clock = asyncio.get_running_loop().time
        while True:
            started = clock()
            if self.alive:
                await self._serve()
            if self._stopping:
                return
            self._suspects.crashed(self._requests.values())
            self._lost("the inference engine stopped unexpectedly; please retry")
            proven = self._has_answered or clock() - started > backoff.longest
            await asyncio.sleep(backoff.after(proven=proven))
            self.restarts += 1
            try:
                await self._spawn()
            except Exception:
                logger.exception("the engine could not be started again")

    async def _serve(self) -> None:
        """Hand out what the engine sends until its process ends."""
        assert self._process is not None
        reader = asyncio.create_task(self._read())
        watchdog = asyncio.create_task(self._watch())
        exited = asyncio.create_task(self._process.wait())
        await asyncio.wait((reader, watchdog, exited), return_when=asyncio.FIRST_COMPLETED)
        if not exited.done():  # it sent what nobody understands, or nothing any more
            self._process.kill()
            await exited
        watchdog.cancel()
        reader.cancel()
        (failure,) = await asyncio.gather(reader, return_exceptions=True)
        if isinstance(failure, Exception):
            logger.error("the engine's messages could not be read", exc_info=failure)

    async def _watch(self) -> None:
        """Returns when the engine has been stuck for too long."""
        while self._silent_for <= 2 * self.stall_seconds:
            await asyncio.sleep(min(1.0, self.stall_seconds / 4))
        logger.error("the engine has been silent for %.0f s with requests in flight; it is ended", self._silent_for)

    @property
    def _silent_for(self) -> float:
        """Seconds since the engine was heard of, if it has requests."""
        return asyncio.get_running_loop().time() - self._heard if self._streams and self.alive else 0.0

    async def _read(self) -> None:
        while True:
            message = await self._receive()
            self._heard = asyncio.get_running_loop().time()
            assert isinstance(message, Update)
            for output in message.outputs:
                self._deliver(output.request_id, _as_refusal(output) or output)
            for refusal in message.refusals:
                error = RequestError(refusal.message, param=refusal.param, code=refusal.code)
                self._deliver(refusal.request_id, error)
            self._moved(message.residency)
            for reply in message.replies:
                self._answered(reply)
            if message.stats is not None:
                self.stats = message.stats
                if self.on_stats is not None:
                    self.on_stats(message.stats)

    def _deliver(self, request_id: str, item: Output | RequestError) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:  # else its reader has left, and the abort is on its way
            stream.put_nowait(item)

    def _lost(self, reason: str) -> None:
        """The engine is gone: every request in flight gets its ending."""
        self.alive = False
        if self._socket is not None:
            self._socket.close()
        for request_id, stream in self._streams.items():
            stream.put_nowait(Output(request_id, finish_reason=FinishReason.ERROR, error=reason))
        self._engine_lost(reason)
        self.stats = EngineStats()
        if self.on_stats is not None:
            self.on_stats(self.stats)

    async def _reap(self, process: asyncio.subprocess.Process) -> None:
        try:
            await asyncio.wait_for(process.wait(), SHUTDOWN_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()

    def _send(self, message: ToEngine) -> None:
        assert self._socket is not None
        self._socket.send(encode(message))  # without a high-water mark this never waits

    async def _receive(self) -> FromEngine:
        assert self._socket is not None
        message: FromEngine = decode_from_engine(await self._socket.recv())
        return message


def _as_refusal(output: Output) -> RequestError | None:
    """What `submit` raises for a request that the engine had taken before it could know better."""
    if output.error_code is None:
        return None
    return RequestError(output.error or "", param=output.error_param, code=output.error_code)
