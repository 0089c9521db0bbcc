"""Whether requests are traced. Without an endpoint nothing of OpenTelemetry is imported, and nobody notes anything."""

import asyncio
import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server.observer import Tracer


class TracingError(RuntimeError):
    """Traces cannot be made. The message is one sentence."""


@asynccontextmanager
async def tracing(endpoint: str | None, version: str) -> AsyncIterator[Tracer | None]:
    """What sends spans to `endpoint` until the block ends; None without one. Raises TracingError."""
    tracer = open_tracer(endpoint, version)
    try:
        yield tracer
    finally:
        if tracer is not None:
            await asyncio.to_thread(tracer.close)


def open_tracer(endpoint: str | None, version: str) -> Tracer | None:
    """To be closed. `version` is ours. Raises TracingError where the extra `tracing` is not installed."""
    if endpoint is None:
        return None
    try:
        otel = importlib.import_module("server.otel")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("opentelemetry"):
            raise
        raise TracingError(
            f"traces to {endpoint} need the extra `tracing`: `pip install 'loramux[tracing]'` adds it"
        ) from error
    tracer: Tracer = otel.exporting(endpoint, version)
    return tracer
