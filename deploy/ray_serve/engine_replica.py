"""One engine as a replica of a Serve deployment: its process, and the adapters that it fetches for itself."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve

from adapters_store.blobs import BlobError
from adapters_store.fetched import FetchedAdapters, UnknownDigest
from adapters_store.registry import RegistryError
from deploy.ray_serve.callers import Callers
from deploy.ray_serve.moves import Moves
from deploy.ray_serve.pinned import PinFollower
from deploy.ray_serve.wire import Hint, Part, Report, decode_request, encode, shortened
from server.config import Settings
from server.engine.adapter_calls import EngineUnavailable
from server.engine.client import EngineClient
from server.engine.config import EngineConfig, RequestError
from server.engine.messages import Refusal
from server.engine.sequence import ENGINE_LOST, Output, Request
from server.log_setup import set_up_log
from server.periodic import repeating
from server.router_folders import RouterFolders
from server.served_model import ServedModel

logger = logging.getLogger(__name__)

FOLLOW_SECONDS = 2.0
SWEEP_SECONDS = 600.0
DEAD_SECONDS = 120.0
"""A replica whose engine could not be started again for so long is replaced, by another machine's where Ray has one."""


class EngineReplica:
    """An engine process behind Ray's calls. Requests name adapters by digest; their files come from the blob store."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, make_engine: Callable[[EngineConfig, float], EngineClient]
    ) -> None:
        set_up_log(settings, "replica")
        model = ServedModel.of(settings)
        self._name: str = serve.get_replica_context().replica_id.unique_id
        self._adapters = await asyncio.to_thread(
            FetchedAdapters.open, model.base.linear_shape, model.store_config(settings), time.time
        )
        self._routers = RouterFolders(self._adapters.registry, self._adapters.blobs, settings.router_folder)
        config = settings.serve.engine_config(model.folder, settings.data_dir)
        self._engine = make_engine(config, settings.serve.stall_timeout)
        self._last_alive = time.monotonic()
        self._moves = Moves()
        try:
            await self._engine.start()
        except BaseException:
            await self._adapters.close()
            raise
        self._adapters.on_gone.append(self._engine.evict)
        self._engine.on_residency = self._moves.moved
        self._callers = Callers(time.monotonic, self._engine.abort)
        self._pins = PinFollower(self._adapters, self._engine)
        self._upkeep = AsyncExitStack()
        await self._upkeep.enter_async_context(repeating(self._pins.follow, FOLLOW_SECONDS))
        await self._upkeep.enter_async_context(repeating(self._callers.look, FOLLOW_SECONDS))
        await self._upkeep.enter_async_context(repeating(self._adapters.sweep, SWEEP_SECONDS))

    async def __del__(self) -> None:
        """Serve awaits this when the replica has been drained."""
        if hasattr(self, "_upkeep"):
            await self._upkeep.aclose()
            await self._engine.stop()
            await self._pins.close()
            await self._adapters.close()

    async def check_health(self) -> None:
        """Serve replaces a replica that raises here."""
        now = time.monotonic()
        if self._engine.alive:
            self._last_alive = now
        elif now - self._last_alive > DEAD_SECONDS:
            raise RuntimeError("the engine cannot be started again")

    async def record_routing_stats(self) -> dict[str, Any]:
        """The fields of a `Standing`, for the request routers of all front ends; Serve asks."""
        stats, residency = self._engine.stats, self._engine.residency
        return {
            "rank": serve.get_replica_context().rank.rank,
            "alive": self._engine.alive and not self._engine.stalled,
            "requests": stats.running + stats.waiting,
            "free_pages": stats.pages.get("free", 1),
            "tiers": {shortened(digest): tier for digest, tier in residency.items()},
        }

    async def name(self, _: Hint) -> str:
        """The replica's unique id."""
        return self._name

    async def info(self, _: Hint) -> bytes:
        """The engine's `EngineInfo`, encoded."""
        return encode(self._engine.info)

    async def report(self, hint: Hint, version: int) -> bytes:
        """A `Report`, encoded, with the adapters that moved after `version`."""
        self._callers.heard(hint.front)
        engine, moves = self._engine, self._moves
        tiers = moves.since(version)
        return encode(Report(self._name, engine.alive, engine.stalled, engine.stats, moves.version, tiers))

    async def prefetch(self, _: Hint, digest: str) -> tuple[str, str | None]:
        """Bring an adapter as near as possible: where it is then, and why it cannot be read."""
        try:
            async with self._adapters.leased((digest,)) as paths:
                return await self._engine.prefetch_now(digest, paths[digest]), None
        except (BlobError, EngineUnavailable, RegistryError, RequestError, UnknownDigest) as error:
            return "disk", str(error)

    async def generate(self, hint: Hint, payload: bytes) -> AsyncGenerator[bytes, None]:
        """Encoded `Part`s of the answer to an encoded `Request`, whose paths are those of another machine."""
        request = decode_request(payload)
        try:
            with self._callers.serving(hint.front, request.id):
                async with self._local(request) as local, aclosing(self._engine.submit(local)) as outputs:
                    async for output in outputs:
                        yield encode(self._part(request, output))
        except RequestError as error:
            yield encode(Part(self._name, refusal=Refusal(request.id, str(error), error.param, error.code)))
        except EngineUnavailable as error:
            yield encode(Part(self._name, lost=str(error)))

    def _part(self, request: Request, output: Output) -> Part:
        if output.error_code == ENGINE_LOST:
            return Part(self._name, lost=output.error or "", crashed=self._engine.suspects.is_suspect(request))
        return Part(self._name, [output])

    @asynccontextmanager
    async def _local(self, request: Request) -> AsyncIterator[Request]:
        """The request with the folders of this machine, which stay in place meanwhile."""
        try:
            async with self._adapters.leased(tuple(request.paths)) as paths:
                yield await self._routed(replace(request, paths=paths))
        except (BlobError, RegistryError, UnknownDigest) as error:
            raise RequestError(str(error), param="model", code="adapter_unavailable") from error

    async def _routed(self, request: Request) -> Request:
        """With the folder of its router, if it has one."""
        if request.gates is not None:
            request = replace(request, gates=replace(request.gates, path=await self._router(request.gates.path)))
        if request.prompt_router is not None:
            path = await self._router(request.prompt_router.path)
            request = replace(request, prompt_router=replace(request.prompt_router, path=path))
        return request

    async def _router(self, path: str) -> str:
        """This machine's folder for one of another machine."""
        try:
            folder = await asyncio.to_thread(self._routers.find, Path(path).name)
        except (BlobError, OSError, RegistryError) as error:
            raise RequestError(str(error), param="model", code="router_unavailable") from error
        if folder is None:
            raise RequestError("the router is not registered any more", param="model", code="router_unavailable")
        return str(folder)
