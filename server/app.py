"""The composition root: settings become services, and services an application."""

import contextlib
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from prometheus_client.exposition import choose_encoder
from starlette.responses import Response

from adapters_store.store import AdapterStore
from routing.router import ExplicitRouter, Routers
from server.chat import ChatTokenizer
from server.checkpoint import locate
from server.choice import ChoiceServices, Engine
from server.config import Settings
from server.deps import Services, ServicesDep, State, check_metrics_key
from server.engine.client import EngineClient
from server.errors import install_error_handlers
from server.generation import SEEDS, Generator
from server.metrics import Metrics
from server.model.config import ModelConfig
from server.openai.routes import router as openai_router
from server.request_id import RequestIds
from server.tenants import Keys


def create_app(settings: Settings, services: Services | None = None) -> FastAPI:
    """The application. Its lifespan opens the services, unless they are given and belong to the caller."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        if services is not None:
            yield State(services=services)
            return
        async with open_services(settings) as opened:
            yield State(services=opened)

    app = FastAPI(
        title="loramux",
        version=version("loramux"),
        summary="One base model, thousands of LoRA adapters, every request its own weighted set of them.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    install_error_handlers(app)
    app.include_router(openai_router, tags=["OpenAI"])
    _add_operations(app)
    app.add_middleware(RequestIds, new_id=_new_id)
    return app


@contextlib.asynccontextmanager
async def open_services(settings: Settings) -> AsyncIterator[Services]:
    """Everything that serves, started, and stopped at the end.

    Raises CheckpointError, ModelError, TokenizerError, AdapterError or EngineStartError, with one sentence each.
    """
    if settings.serve.model is None:
        raise ValueError("no model is given, expected --model FOLDER or a hub id")
    folder = locate(settings.serve.model, settings.data_dir)
    local = Path(settings.serve.model).expanduser().is_dir()
    served_name = settings.serve.served_name or (
        folder.resolve().name if local else settings.serve.model.split("/")[-1]
    )
    store = AdapterStore(ModelConfig.from_folder(folder).linear_shape, time.time, reserved=(served_name,))
    if settings.serve.adapters is not None:
        store.register_folder(settings.serve.adapters)
    tokenizer = ChatTokenizer.from_folder(folder)
    engine = EngineClient(settings.serve.engine_config(folder, settings.data_dir))
    services = assemble(settings, served_name, engine, store, tokenizer)
    engine.on_stats = lambda stats: services.metrics.engine(stats, time.time())
    try:
        await engine.start()
        engine.prefetch({adapter.digest: str(adapter.path) for adapter in store.list("default")})
        yield services
    finally:
        await engine.stop()


def assemble(
    settings: Settings, served_name: str, engine: Engine, store: AdapterStore, tokenizer: ChatTokenizer
) -> Services:
    """The services around an engine, a store and a tokenizer."""
    serve = settings.serve
    metrics = Metrics(serve.metrics_max_adapters, serve.max_num_seqs)
    metrics.registered(len(store.list("default")))
    generator = Generator(
        ChoiceServices(engine, tokenizer, metrics, time.perf_counter),
        store,
        Routers(ExplicitRouter(store, served_name, time.perf_counter)),
        new_id=_new_id,
        new_seed=lambda: secrets.randbelow(SEEDS),
    )
    keys = Keys(
        [key.get_secret_value() for key in serve.api_key],
        serve.admin_key.get_secret_value() if serve.admin_key is not None else None,
        serve.metrics_key.get_secret_value() if serve.metrics_key is not None else None,
    )
    return Services(
        served_name=served_name,
        engine=engine,
        store=store,
        tokenizer=tokenizer,
        generator=generator,
        metrics=metrics,
        keys=keys,
        limits=settings.limits,
        metrics_public=serve.metrics_public,
        now=time.time,
        started=time.time(),
    )


def _add_operations(app: FastAPI) -> None:
    """What operators and load balancers ask."""

    @app.get("/health", tags=["operations"])
    async def health(services: ServicesDep) -> JSONResponse:
        """200 while an engine lives."""
        return _state("ok" if services.engine.alive else "no engine", services.engine.alive)

    @app.get("/ready", tags=["operations"])
    async def ready(services: ServicesDep) -> JSONResponse:
        """200 while new requests are taken."""
        if services.generator.is_draining:
            return _state("shutting down", False)
        return _state("ready" if services.engine.alive else "no engine", services.engine.alive)

    @app.get("/version", tags=["operations"])
    async def get_version() -> dict[str, str]:
        return {"version": version("loramux")}

    @app.get("/metrics", tags=["operations"], dependencies=[Depends(check_metrics_key)])
    async def metrics(request: Request, services: ServicesDep) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(services.metrics.registry), headers={"Content-Type": content_type})


def _state(status: str, is_good: bool) -> JSONResponse:
    code = HTTPStatus.OK if is_good else HTTPStatus.SERVICE_UNAVAILABLE
    return JSONResponse({"status": status}, status_code=code, headers=None if is_good else {"Retry-After": "2"})


def _new_id() -> str:
    return uuid.uuid4().hex
