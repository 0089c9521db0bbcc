"""Everything that serves, opened from the settings, kept up while it serves, and closed in order."""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from importlib.metadata import version

from adapters_store.blobs import BlobError
from adapters_store.registry import DEFAULT_TENANT, NamedAdapter, RegistryUnavailable
from adapters_store.store import AdapterStore, StoreConfig, UnknownAdapter
from adapters_store.types import LinearShape
from server.accounts import REFRESH_SECONDS
from server.assembly import assemble
from server.chat import ChatTokenizer
from server.config import Settings
from server.deps import EngineGroup, Services
from server.engine.client import EngineClient
from server.engine.config import EngineConfig, EngineStats
from server.engine.conversation import EngineConversation
from server.engine.pool import EnginePool
from server.metrics import Metrics
from server.part import Part
from server.periodic import repeating
from server.quotas import SETTLE_SECONDS
from server.router_setup import encoder_name, encoder_process
from server.served_model import ServedModel
from server.tools.form import FORMS
from server.tracing import tracing
from server.usage import FLUSH_SECONDS

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 600.0
SWEEP_GRACE = 3600.0
"""Longer than any registration takes from its first file to its name."""
COUNT_SECONDS = 10.0
ROUTERS_SECONDS = 0.5
PINS_SECONDS = 0.5
READY_SECONDS = 30.0
"""So long the start waits for the encoder, which is ready before the engine unless thousands of samples are new."""


@contextlib.asynccontextmanager
async def open_services(
    settings: Settings, engines: EngineConversation | EngineGroup | None = None, part: Part | None = None
) -> AsyncIterator[Services]:
    """Everything that serves, started, and stopped at the end. `engines` None: processes of its own. `part`: where
    several processes answer requests.

    Raises CheckpointError, ModelError, TokenizerError, StoreOpenError, AdapterError, BlobError, RegistryError,
    EngineStartError or TracingError, with one sentence each.
    """
    part, model = part or Part(), ServedModel.of(settings)
    served_name, config = model.served_name, model.store_config(settings)
    tokenizer = ChatTokenizer.from_folder(model.folder, FORMS.get(settings.serve.tool_parser))
    reserved = (served_name, *encoder_name(settings))
    async with (
        tracing(settings.serve.otlp_endpoint, version("loramux")) as tracer,
        open_store(model.base.linear_shape, model.base_name, config, reserved, is_first=part.is_first) as store,
    ):
        given: Sequence[NamedAdapter] = ()
        if settings.serve.adapters is not None and part.is_first:
            given = await store.register_folder(settings.serve.adapters)
        configs = settings.serve.engine_configs(model.folder, settings.data_dir)
        engine = engines or make_engine(configs, settings.serve.stall_timeout)
        process, absent = encoder_process(settings)
        fingerprint = model.base.fingerprint()
        services = assemble(settings, served_name, engine, store, tokenizer, fingerprint, process, absent, tracer, part)
        watch_engine(engine, services.metrics, time.time)
        is_shared = part.shares_registry(settings.serve)
        async with accounting(services), upkeep(services, follows_pins=is_shared):
            try:
                if engines is None:
                    logger.info("starting engines for %s", model.folder)  # nothing else is heard for long
                await services.routers.start()  # the encoder loads while the engine does
                await engine.start()
                await services.catalog.start()
                if not part.is_first:
                    await store.take_up_deletions()
                await services.routers.ready(READY_SECONDS)
                engine.prefetch(await prefetched(store, given, sum(config.host_memory for config in configs)))
                yield services
            finally:
                await engine.stop()
                await services.routers.close()
                await services.catalog.close()


def make_engine(configs: Sequence[EngineConfig], stall_seconds: float) -> EngineClient | EnginePool:
    """A single engine is served without a pool, so that it costs nothing more."""
    if len(configs) == 1:
        return EngineClient(configs[0], stall_seconds)
    return EnginePool.of(configs, stall_seconds, random.Random())


def watch_engine(engine: EngineConversation | EngineGroup, metrics: Metrics, now: Callable[[], float]) -> None:
    """What engines say of themselves is counted."""
    for number, member in enumerate(engine.members):
        metrics.watch(str(number), partial(getattr, member, "alive"))
        metrics.engine(EngineStats(), now(), str(number))  # gateways read it before the first request comes
    if isinstance(engine, EngineConversation):
        engine.on_stats = lambda stats: metrics.engine(stats, now())
    else:
        engine.on_move = metrics.moved
        engine.on_stats = lambda number, stats: metrics.engine(stats, now(), str(number))


@contextlib.asynccontextmanager
async def open_store(
    shape: LinearShape, base_name: str, config: StoreConfig, reserved: Sequence[str], *, is_first: bool = True
) -> AsyncIterator[AdapterStore]:
    """The adapters, until the block ends. Raises StoreOpenError."""
    opened = partial(AdapterStore.open, shape, base_name, config, time.time, reserved, is_first=is_first)
    store = await asyncio.to_thread(opened)
    try:
        yield store
    finally:
        await store.close()


@contextlib.asynccontextmanager
async def upkeep(services: Services, *, follows_pins: bool = False) -> AsyncIterator[None]:
    """Files that nothing needs go, the number of adapters is shown, and what other processes change is followed."""

    async def pins() -> None:
        if follows_pins:
            await services.catalog.refresh()

    async def count() -> None:
        try:
            services.metrics.registered(await services.store.count())
        except RegistryUnavailable as error:
            logger.warning("adapters are not counted: %s", error)

    async def sweep() -> None:
        try:
            await services.store.sweep(SWEEP_GRACE)
        except (BlobError, RegistryUnavailable) as error:
            logger.warning("files that nothing needs stay for now: %s", error)

    async with (
        repeating(sweep, SWEEP_SECONDS),
        repeating(count, COUNT_SECONDS),
        repeating(services.routers.refresh, ROUTERS_SECONDS),
        repeating(pins, PINS_SECONDS),
    ):
        yield


async def prefetched(store: AdapterStore, adapters: Sequence[NamedAdapter], most_bytes: int) -> dict[str, str]:
    """Folders, by digest, of those adapters that host memory holds at the same time; empty if they cannot be read."""
    chosen: list[str] = []
    for adapter in adapters:
        most_bytes -= adapter.adapter.bytes
        if most_bytes < 0:
            break
        chosen.append(adapter.name)
    found = await store.resolve(DEFAULT_TENANT, chosen)
    try:
        lease = await store.lease(DEFAULT_TENANT, tuple(found.values()))
    except (BlobError, UnknownAdapter) as error:
        logger.warning("adapters are not read in advance: %s", error)
        return {}
    store.release(lease)
    return dict(lease.paths)


@contextlib.asynccontextmanager
async def accounting(services: Services) -> AsyncIterator[None]:
    """Tenants, keys and the ledger keep up with the registry; at the end the ledger is complete."""
    try:
        async with (
            repeating(services.accounts.refresh, REFRESH_SECONDS),
            repeating(services.usage.flush, FLUSH_SECONDS),
            repeating(services.quotas.settle, SETTLE_SECONDS),
        ):
            yield
    finally:
        await services.quotas.close()
        services.accounts.close()
        await services.usage.close()
