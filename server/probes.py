"""Whether the server lives, takes requests and computes; its version, and its metrics."""

import asyncio
from http import HTTPStatus
from importlib.metadata import version

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from prometheus_client.exposition import choose_encoder
from starlette.responses import Response

from server.answers import HEALTH, REFUSALS, text
from server.deps import ServicesDep, check_metrics_key
from server.metrics_sum import all_processes


def add_probes(app: FastAPI) -> None:
    """What operators and load balancers ask."""

    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["operations"], responses=HEALTH)
    async def health(services: ServicesDep) -> JSONResponse:
        """200 while an engine lives."""
        return _state("ok" if services.engine.alive else "no engine", services.engine.alive)

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", tags=["operations"], responses=HEALTH)
    async def ready(services: ServicesDep) -> JSONResponse:
        """200 while new requests are taken."""
        if services.generator.is_draining:
            return _state("shutting down", False)
        return _state("ready" if services.engine.alive else "no engine", services.engine.alive)

    @app.head("/health/decode", include_in_schema=False)
    @app.get("/health/decode", tags=["operations"], responses=HEALTH)
    async def decode(services: ServicesDep) -> JSONResponse:
        """503 while a step of an engine is stuck: it has requests, and is silent longer than `--stall-timeout`."""
        if not services.engine.alive:
            return _state("no engine", False)
        is_stuck = any(engine.stalled for engine in services.engine.members)
        return _state("stuck" if is_stuck else "ok", not is_stuck)

    @app.head("/version", include_in_schema=False)
    @app.get("/version", tags=["operations"])
    async def get_version() -> dict[str, str]:
        """The server's version."""
        return {"version": version("loramux")}

    @app.get(
        "/metrics",
        tags=["operations"],
        dependencies=[Depends(check_metrics_key)],
        response_class=Response,
        responses=text("Prometheus' text format, or OpenMetrics if `Accept` asks for it.") | REFUSALS,
    )
    async def metrics(request: Request, services: ServicesDep) -> Response:
        """For Prometheus. Takes the admin key or the metrics key, where there are keys."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        # With a hundred adapters it takes 80 ms, for which the event loop has no time.
        counted = await all_processes(services.metrics.registry, services.siblings)
        written = await asyncio.to_thread(encode, counted)
        return Response(written, headers={"Content-Type": content_type})


def _state(status: str, is_good: bool) -> JSONResponse:
    code = HTTPStatus.OK if is_good else HTTPStatus.SERVICE_UNAVAILABLE
    return JSONResponse({"status": status}, status_code=code, headers=None if is_good else {"Retry-After": "2"})
