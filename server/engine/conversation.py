"""The front end's conversation with an engine: requests and the streams of their outputs."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace

import zmq
import zmq.asyncio

from server.engine.adapter_calls import AdapterCalls, EngineUnavailable
from server.engine.config import EngineInfo, EngineStats, RequestError
from server.engine.messages import Abort, Hello, Submit, ToEngine, Update, decode_from_engine, encode
from server.engine.sequence import ENGINE_LOST, FinishReason, Output, Request
from server.engine.suspects import Suspicion

STALL_SECONDS = 60.0
"""An engine that works reports four times a second; a step that compiles kernels may take half a minute."""

WELL_ENDED = (FinishReason.STOP, FinishReason.LENGTH)

logger = logging.getLogger(__name__)


class EngineConversation(AdapterCalls):
    """With one engine, from `connect` to `lost`, and then with the next one. When an engine dies, requests in flight
    end with an error each.

    `name`: no other front end of the engine has the same. An engine that is silent for `stall_seconds` and owes
    somebody an ending counts as stuck; `on_stuck` is called when it has been for twice that time, and again while it
    is. `on_answered` hears of every request that an engine has answered to its end, read or not. `info` is that of the
    last engine, None before the first.
    """

    def __init__(self, name: str, suspects: Suspicion, stall_seconds: float = STALL_SECONDS) -> None:
        super().__init__()
        self.info: EngineInfo | None = None
        self.stall_seconds = stall_seconds
        self.stats = EngineStats()
        self.on_stuck: Callable[[], None] = _nothing
        self.on_answered: Callable[[], None] = _nothing
        self.on_stats: Callable[[EngineStats], None] | None = None
        self._streams: dict[str, asyncio.Queue[Output | RequestError]] = {}
        self._requests: dict[str, Request] = {}  # those that the engine has not ended, however far their readers are
        self._taken: set[str] = set()
        self._name = name
        self._suspects = suspects
        self._heard = 0.0
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._listening: asyncio.Task[None] | None = None
        self._first = asyncio.Event()

    @property
    def members(self) -> "tuple[EngineConversation]":
        """The engines behind this conversation: one."""
        return (self,)

    @property
    def unheard_for(self) -> float:
        """Seconds since the engine was heard of."""
        return asyncio.get_running_loop().time() - self._heard

    @property
    def stalled(self) -> bool:
        """Whether a step seems to be stuck: there is work, and nothing has been heard of it for too long."""
        return self._silent_for > self.stall_seconds

    async def start(self) -> None:
        """Wait for the first engine."""
        await self._first.wait()

    async def stop(self) -> None:
        """No engine follows; requests in flight end with an error."""
        self.lost("the server is shutting down")
        self._context.destroy(linger=0)

    def connect(self, address: str, info: EngineInfo) -> None:
        """An engine is there, of which nobody has asked anything yet."""
        self.info = info
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IDENTITY, self._name.encode())
        self._socket.connect(address)
        self.alive, self._heard = True, asyncio.get_running_loop().time()
        self._send(Hello())
        self._engine_started()
        self._first.set()
        self._listening = asyncio.create_task(self._listen(self._socket))

    def in_flight(self) -> tuple[Request, ...]:
        """What the engine has in hand. What it has only been sent is not why it died: it may have been dead by then."""
        return tuple(request for request in self._requests.values() if request.id in self._taken)

    def lost(self, reason: str) -> None:
        """The engine is gone: every request in flight gets its ending."""
        self.alive = False
        if self._listening is not None:
            self._listening.cancel()
        if self._socket is not None:
            self._socket.close()
        for request_id, stream in self._streams.items():
            ending = Output(request_id, finish_reason=FinishReason.ERROR, error=reason, error_code=ENGINE_LOST)
            stream.put_nowait(ending)
        self._engine_lost(reason)
        self.stats = EngineStats()
        if self.on_stats is not None:
            self.on_stats(self.stats)

    async def submit(self, request: Request) -> AsyncGenerator[Output, None]:
        """Outputs of the request as they come; the last has a finish reason.

        Closing the generator early aborts the request. A request that was in flight when an engine died is tried once
        more, while no other such request is. Raises RequestError for what the engine refuses, and for a request that
        an engine died of twice; EngineUnavailable when no engine lives.
        """
        clock = asyncio.get_running_loop().time
        asked = clock()
        async with AsyncExitStack() as turn:
            try:
                async with asyncio.timeout(request.timeout):
                    await turn.enter_async_context(self._suspects.admitted(request))
            except TimeoutError:
                yield Output(request.id, finish_reason=FinishReason.TIMEOUT)
                return
            if request.timeout is not None:
                request = replace(request, timeout=request.timeout + asked - clock())
            async with aclosing(self._submit(request)) as outputs:
                async for output in outputs:
                    yield output

    async def _submit(self, request: Request) -> AsyncGenerator[Output, None]:
        if not self.alive:
            raise EngineUnavailable("the inference engine is not running, it is being restarted")
        stream: asyncio.Queue[Output | RequestError] = asyncio.Queue()
        if not self._requests:
            self._heard = asyncio.get_running_loop().time()  # before it had nothing to say
        self._streams[request.id], self._requests[request.id] = stream, request
        ended = has_begun = False
        try:
            self._send(Submit(request))
            while not ended:
                item = await stream.get()
                ended = isinstance(item, RequestError) or item.finish_reason is not None
                if isinstance(item, RequestError):
                    raise item
                has_begun = has_begun or bool(item.tokens)
                yield item
        finally:
            self._streams.pop(request.id, None)
            self._requests.pop(request.id, None)
            self._taken.discard(request.id)
            if not ended:
                self.abort(request.id)
                if has_begun:  # it may have come to a stop string: the front end ends those, and they are answered
                    self._suspects.cleared(request)

    def abort(self, request_id: str) -> None:
        """End a request; its stream, if somebody still reads it, gets its ending."""
        if self.alive:
            self._send(Abort(request_id))

    async def _listen(self, socket: zmq.asyncio.Socket) -> None:
        """Hand out what the engine sends. One that sends what nobody understands, or nothing any more, is ended."""
        watchdog = asyncio.create_task(self._watch())
        try:
            await self._read(socket)
        except Exception:
            logger.exception("the engine's messages could not be read")
            self.on_stuck()
        finally:
            watchdog.cancel()
            await asyncio.gather(watchdog, return_exceptions=True)

    async def _watch(self) -> None:
        """Looks whether the engine is stuck. It is if the next look finds the same: behind the first one there may be
        messages that wait to be read, where it was this process that stood still.
        """
        looks = 0
        while True:
            await asyncio.sleep(min(1.0, self.stall_seconds / 4))
            looks = looks + 1 if self._silent_for > 2 * self.stall_seconds else 0
            if looks > 1:
                logger.error("the engine owes answers and has been silent for %.0f s", self._silent_for)
                self.on_stuck()
                looks = 0

    @property
    def _silent_for(self) -> float:
        """Seconds since the engine was heard of, if it has requests. What is answered and not read yet is none."""
        return self.unheard_for if self._requests and self.alive else 0.0

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            message = decode_from_engine(await socket.recv())
            self._heard = asyncio.get_running_loop().time()
            assert isinstance(message, Update)
            self._taken.update(self._requests.keys() & message.taken)
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
        if stream is None:
            return  # its reader has left, and the abort is on its way
        stream.put_nowait(item)
        if isinstance(item, RequestError) or item.finish_reason is not None:
            self._taken.discard(request_id)
            request = self._requests.pop(request_id, None)
            if request is not None and isinstance(item, Output) and item.finish_reason in WELL_ENDED:
                self._suspects.cleared(request)
                self.on_answered()

    def _send(self, message: ToEngine) -> None:
        assert self._socket is not None
        self._socket.send(encode(message))  # without a high-water mark this never waits


def _nothing() -> None:
    """Nobody wants to know."""


def _as_refusal(output: Output) -> RequestError | None:
    """What `submit` raises for a request that the engine had taken before it could know better."""
    if output.error_code is None:
        return None
    return RequestError(output.error or "", param=output.error_param, code=output.error_code)
