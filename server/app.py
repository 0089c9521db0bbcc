"""The composition root: settings become services, and services an application."""

import asyncio
import contextlib
import logging
import random
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from adapters_store.blobs import BlobError
from adapters_store.registry import DEFAULT_TENANT, NamedAdapter
from adapters_store.store import AdapterStore, StoreConfig, UnknownAdapter
from adapters_store.types import LinearShape
from routing.encoder import EncoderProcess
from routing.router import ExplicitRouter, Routers
from server.accounts import REFRESH_SECONDS, AccountService
from server.admin.routes import router as admin_router
from server.catalog import Catalog, policies
from server.chat import ChatTokenizer
from server.choice import ChoiceServices
from server.choices import SEEDS
from server.config import Settings
from server.console.routes import add_console
from server.deps import EngineGroup, Services, ServingEngine, State
from server.engine.client import EngineClient
from server.engine.config import EngineConfig, EngineStats
from server.engine.conversation import EngineConversation
from server.engine.pool import EnginePool
from server.error_handlers import install_error_handlers
from server.generation import Generator
from server.key_ring import KeyRing
from server.leases_elsewhere import LeasesElsewhere
from server.lender import Lender
from server.local_only import LocalOnly
from server.metrics import Metrics
from server.metrics_sum import answer_others
from server.observer import Observer, Tracer
from server.openai.embeddings import router as embeddings_router
from server.openai.routes import router as openai_router
from server.part import Part
from server.periodic import repeating
from server.probes import add_probes
from server.process_state import Processes
from server.quotas import SETTLE_SECONDS, QuotaGate
from server.rate_limit_headers import RATE_LIMIT_HEADERS, RateLimitHeaders
from server.request_id import RequestIds
from server.router_setup import embedder_of, encoder_name, encoder_process, router_service
from server.served_model import ServedModel
from server.tenants import Keys, Tenants
from server.tools.form import FORMS
from server.tracing import tracing
from server.usage import FLUSH_SECONDS, UsageLedger
from server.waiting import Waiting

logger = logging.getLogger(__name__)

CORS: dict[str, Any] = {
    "allow_methods": ("DELETE", "GET", "PATCH", "POST"),
    "allow_headers": ("*",),
    "expose_headers": ("x-request-id", "x-loramux-route", "retry-after", "traceresponse", *RATE_LIMIT_HEADERS),
}
"""What pages of the allowed origins may send and read; keys come in a header, never in cookies."""
NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""The framework's own, which tells of bodies and errors what is not to leave the server: `otel.py` makes the spans."""
SWEEP_SECONDS = 600.0
SWEEP_GRACE = 3600.0
"""Longer than any registration takes from its first file to its name."""
COUNT_SECONDS = 10.0
ROUTERS_SECONDS = 0.5
PINS_SECONDS = 0.5
READY_SECONDS = 30.0
"""So long the start waits for the encoder, which is ready before the engine unless thousands of samples are new."""


def create_app(
    settings: Settings,
    services: Services | None = None,
    engines: EngineGroup | None = None,
    part: Part | None = None,
) -> FastAPI:
    """The application. Its lifespan opens the services, with these engines, unless the caller has opened them."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        if services is not None:
            yield State(services=services)
            return
        async with open_services(settings, engines, part) as opened:
            yield State(services=opened)

    app = FastAPI(
        title="loramux",
        version=version("loramux"),
        summary="One base model, thousands of LoRA adapters, every request its own weighted set of them.",
        lifespan=lifespan,
        redirect_slashes=False,
        telemetry=NO_TELEMETRY,
    )
    install_error_handlers(app)
    app.include_router(openai_router, tags=["OpenAI"])
    app.include_router(embeddings_router, tags=["OpenAI"])
    app.include_router(admin_router)
    add_probes(app)
    add_console(app)
    origins = settings.http.cors_origins
    if settings.serve.is_open and not settings.serve.insecure:
        app.add_middleware(LocalOnly, origins=origins)
    app.add_middleware(RateLimitHeaders)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, **CORS)
    app.add_middleware(RequestIds, new_id=_new_id)
    return app


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
        services.metrics.registered(await services.store.count())

    sweep = partial(services.store.sweep, SWEEP_GRACE)
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


def assemble(
    settings: Settings,
    served_name: str,
    engine: ServingEngine,
    store: AdapterStore,
    tokenizer: ChatTokenizer,
    fingerprint: str,
    process: EncoderProcess | None = None,
    absent: str = "it has no encoder",
    tracer: Tracer | None = None,
    part: Part | None = None,
) -> Services:
    """The services around an engine, a store and a tokenizer.

    `fingerprint` is the base model's; `absent` says why there is no encoder `process`. Without a `tracer` nothing is
    traced.
    """
    serve, part = settings.serve, part or Part()
    metrics = Metrics(serve.metrics_max_adapters, serve.max_num_seqs * serve.engines)
    metrics.registered(store.registry.count())
    tenants, ring = Tenants(), KeyRing()
    accounts = AccountService(store.registry.accounts, tenants, ring, secrets.token_bytes)
    lender = None
    if part.shares_registry(serve):
        lender = Lender(store.registry.budgets(part.name), time.monotonic, serve.frontends)
    quotas = QuotaGate(tenants, time.perf_counter, metrics.quota_rejected, lender)
    usage = UsageLedger(store.registry, time.time)
    catalog = Catalog(store, engine, policies(settings), time.monotonic, settings.limits.uploads)
    catalog.on_rejection = metrics.quota_rejected
    usage.on_use = catalog.residency.used
    explicit = ExplicitRouter(store, served_name, time.perf_counter)
    routers = Routers(explicit, default=serve.default_router, absent=absent)
    service = router_service(settings, store, routers, process, fingerprint)
    catalog.on_change = service.follow
    generator = Generator(
        ChoiceServices(engine, tokenizer, metrics, time.perf_counter),
        store,
        routers,
        quotas,
        usage,
        new_id=_new_id,
        new_seed=lambda: secrets.randbelow(SEEDS),
        most_scores=settings.limits.prompt_logprobs,
        waiting=Waiting(serve.max_waiting, time.perf_counter, part.slot),
        log_prompts=serve.log_prompts,
        fetches=part.fetches,
    )
    keys = Keys(
        [key.get_secret_value() for key in serve.api_key],
        serve.admin_key.get_secret_value() if serve.admin_key is not None else None,
        serve.metrics_key.get_secret_value() if serve.metrics_key is not None else None,
        ring,
        tenants,
    )
    accounts.load()
    answer_others(metrics.registry, part.siblings)
    store.share_with(LeasesElsewhere(part.siblings, store))
    return Services(
        served_name=served_name,
        engine=engine,
        store=store,
        catalog=catalog,
        routers=service,
        tokenizer=tokenizer,
        embedder=embedder_of(settings, process),
        generator=generator,
        metrics=metrics,
        keys=keys,
        accounts=accounts,
        quotas=quotas,
        usage=usage,
        siblings=part.siblings,
        processes=Processes(part.siblings, generator, lambda: catalog.slots.taken),
        limits=settings.limits,
        http=settings.http,
        metrics_public=serve.metrics_public,
        observer=Observer(metrics, time.perf_counter, tracer),
        now=time.time,
        started=time.time(),
    )


def _new_id() -> str:
    return uuid.uuid4().hex
