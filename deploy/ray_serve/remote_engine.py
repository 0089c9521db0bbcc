"""The engines of a deployment as one engine client of a front end."""

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from adapters_store.types import LinearShape
from deploy.ray_serve.fleet import Fleet, FleetMember
from deploy.ray_serve.pinned import PinBudget
from deploy.ray_serve.watch import Watch
from deploy.ray_serve.wire import Hint, Part, decode_info, decode_part, encode, shortened, wanted_by
from server.engine.adapter_calls import EngineUnavailable
from server.engine.config import EngineInfo, EngineStats, RequestError
from server.engine.journey import CLEARED_TOKENS, Journey
from server.engine.placement import Wanted
from server.engine.sequence import FinishReason, Output, Request
from server.engine.suspects import Suspects

logger = logging.getLogger(__name__)

TRIES = 3
"""Replicas that may lose one request before its client is told."""
GONE = "the engine's machine or process is gone; please retry"


class _Lost(Exception):
    """An engine has lost the request. `crashed`: its process died meanwhile, perhaps because of it."""

    def __init__(self, reason: str, replica: str | None = None, crashed: bool = False) -> None:
        super().__init__(reason)
        self.replica = replica
        self.crashed = crashed


class RemoteEngine:
    """Requests go to one of the replicas behind `handle`, and to another one when they are lost before their first
    token. `name` is this front end's, `shape` is the model's, `clock` counts seconds.
    """

    def __init__(self, handle: DeploymentHandle, name: str, shape: LinearShape, clock: Callable[[], float]) -> None:
        self.on_move: Callable[[], None] | None = None
        self._handle = handle
        self._name = name
        self._clock = clock
        self._generate = handle.generate.options(stream=True)
        self._numbers = itertools.count()
        self._running: dict[str, DeploymentResponseGenerator] = {}
        self._suspects = Suspects()
        self._pins = PinBudget(shape)
        self._fleet = Fleet()
        self._watch = Watch(handle, name, self._fleet)
        self._watching: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo | None:
        """What a front end needs to know, which is the same of all."""
        return self._fleet.info

    @property
    def alive(self) -> bool:
        return self._fleet.alive

    @property
    def members(self) -> Sequence[FleetMember]:
        return self._fleet.members

    @property
    def on_stats(self) -> Callable[[int, EngineStats], None] | None:
        return self._fleet.on_stats

    @on_stats.setter
    def on_stats(self, listener: Callable[[int, EngineStats], None] | None) -> None:
        self._fleet.on_stats = listener

    @property
    def on_residency(self) -> Callable[[str, str], None] | None:
        return self._fleet.on_residency

    @on_residency.setter
    def on_residency(self, listener: Callable[[str, str], None] | None) -> None:
        self._fleet.on_residency = listener

    async def start(self) -> None:
        """Wait until there is an engine, and learn what it is; all have the same model and settings."""
        self._fleet.info = decode_info(await self._handle.info.remote(Hint()))
        await self._watch.look()
        self._watching = asyncio.create_task(self._watch.run())

    async def stop(self) -> None:
        """End what runs. The engines stay."""
        for request_id in tuple(self._running):
            self.abort(request_id)
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait((self._watching,))

    async def submit(self, request: Request) -> AsyncGenerator[Output, None]:
        """As `EngineClient.submit`, but while there is no engine a request waits, as long as its `timeout` lets it."""
        journey, wanted = Journey(request, self._clock), wanted_by(request)
        avoid: tuple[str, ...] = ()
        for attempt in range(TRIES):
            if attempt and self.on_move is not None:
                self.on_move()
            hint = Hint(wanted, f"{request.id}/{attempt}", avoid=avoid, front=self._name)
            try:
                async with self._suspects.admitted(request), aclosing(self._attempt(journey.request, hint)) as outputs:
                    async for output in outputs:
                        for each in journey.take(output):
                            yield each
                        is_further = bool(journey.moves) and journey.num_tokens >= CLEARED_TOKENS
                        if is_further or output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                            self._suspects.cleared(request)
                    return
            except _Lost as lost:
                logger.warning("request %s was lost: %s", request.id, lost)
                if lost.crashed:
                    self._suspects.crashed([request])
                if journey.num_tokens:
                    yield Output(request.id, finish_reason=FinishReason.ERROR, error=GONE)
                    return
                avoid += (lost.replica,) if lost.replica is not None else ()
            if not journey.move():
                yield Output(request.id, finish_reason=FinishReason.TIMEOUT)
                return
        raise EngineUnavailable(GONE)

    def abort(self, request_id: str) -> None:
        """End a request; its stream, if somebody still reads it, gets its ending."""
        response = self._running.get(request_id)
        if response is not None:
            response.cancel()

    async def _attempt(self, request: Request, hint: Hint) -> AsyncGenerator[Output, None]:
        """Send it to one engine. Raises _Lost, RequestError."""
        response = self._running[request.id] = self._generate.remote(hint, encode(request))
        part: Part | None = None
        try:
            while part is None or not part.is_last:
                # An engine watches over the time of what it has; until there is one, nobody else does.
                async with asyncio.timeout(request.timeout if part is None else None):
                    part = decode_part(await anext(response))
                if part.refusal is not None:
                    raise RequestError(part.refusal.message, param=part.refusal.param, code=part.refusal.code)
                if part.lost is not None:
                    raise _Lost(part.lost, part.replica, part.crashed)
                for output in part.outputs:
                    yield output
        except TimeoutError:
            yield Output(request.id, finish_reason=FinishReason.TIMEOUT)
        except RequestCancelledError:
            yield Output(request.id, finish_reason=FinishReason.ABORT)
        except StopAsyncIteration:
            raise _Lost("its stream ended early") from None
        except (RayError, RayServeException) as error:
            raise _Lost(str(error).partition("\n")[0]) from error
        finally:
            self._running.pop(request.id, None)
            if part is None or not part.is_last:
                response.cancel()

    async def pin(self, digest: str, path: str) -> bool:
        """Whether there is room; engines follow what the registry has as pinned."""
        assert self.info is not None
        return await self._pins.pin(digest, path, self.info)

    def unpin(self, digest: str) -> None:
        self._pins.unpin(digest)

    async def prefetch_now(self, digest: str, path: str) -> str:  # noqa: ARG002
        """Bring an adapter to the engine that requests for it would go to."""
        hint = Hint(Wanted((shortened(digest),)), f"{digest}/{next(self._numbers)}")
        tier, problem = await self._handle.prefetch.remote(hint, digest)
        if problem is not None:
            raise RequestError(problem, param="model", code="adapter_unavailable")
        return str(tier)

    def prefetch(self, paths: Mapping[str, str]) -> None:
        """Nothing is read ahead: an adapter is wanted on the engines that its requests go to, not on all."""

    def evict(self, digest: str) -> None:
        """Nothing is sent: engines look by themselves which adapters nobody has any more."""
