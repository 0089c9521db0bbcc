"""The application: routes, middlewares and error handlers around the services."""

import contextlib
import uuid
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from server.admin.routes import router as admin_router
from server.config import Settings
from server.console.routes import add_console
from server.deps import EngineGroup, Services, State
from server.error_handlers import install_error_handlers
from server.local_only import LocalOnly
from server.openai.embeddings import router as embeddings_router
from server.openai.routes import router as openai_router
from server.opening import open_services
from server.part import Part
from server.probes import add_probes
from server.rate_limit_headers import RATE_LIMIT_HEADERS, RateLimitHeaders
from server.request_id import RequestIds

CORS: dict[str, Any] = {
    "allow_methods": ("DELETE", "GET", "PATCH", "POST"),
    "allow_headers": ("*",),
    "expose_headers": ("x-request-id", "x-loramux-route", "retry-after", "traceresponse", *RATE_LIMIT_HEADERS),
}
"""What pages of the allowed origins may send and read; keys come in a header, never in cookies."""
NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""The framework's own, which tells of bodies and errors what is not to leave the server: `otel.py` makes the spans."""


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
    app.add_middleware(RequestIds, new_id=lambda: uuid.uuid4().hex)
    return app
