"""Spans of OpenTelemetry, made from journals: only where requests are traced is this imported.

    POST /v1/chat/completions            the caller's trace goes on
    └── chat sql                         tokens, route
        ├── prompt, route, lease         in the front end
        └── engine                       one for each choice, from its submission to its end
            ├── queue                    adapters and routers are read, then others are served
            ├── prefill
            └── decode

All but the first are made when the request has ended, with the times that were noted on the way: while it runs tracing
costs nothing more, and the engine's process, which tells how long its parts took, needs to know nothing of it.
"""

import threading
import time
import uuid
from collections.abc import Callable
from http import HTTPStatus

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)

from server.journal import CLIENT_GONE, READER_STALLED, Asked, Ending, Journal
from server.span_attributes import Attributes, http_attributes, request_attributes, usage_attributes
from server.trace_context import TraceContext

CLOSE_SECONDS = 5.0
"""How long a server that stops waits for its last spans to be taken."""
LOADING_SECONDS = 1e-3
"""Adapters that were there took less to be looked up: no event tells of that."""
CLIENTS = frozenset({CLIENT_GONE, READER_STALLED})
"""Ends that are no failure of ours."""


def exporting(endpoint: str, version: str) -> "OtelTracer":
    """Sends spans by OTLP over HTTP, in batches and from a thread of its own.

    The SDK reads its standard variables: sampler, headers, limits, time-outs, names of the service.
    """
    ours = {SERVICE_VERSION: version, SERVICE_INSTANCE_ID: str(uuid.uuid4())}
    resource = Resource.create(ours)
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "loramux"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return OtelTracer(provider, version, time.time_ns)


class OtelTracer:
    """See `observer.Tracer`. `now` counts nanoseconds since the epoch."""

    def __init__(self, provider: TracerProvider, version: str, now: Callable[[], int]) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("loramux", version)
        self._now = now

    def begin(self, journal: Journal, caller: TraceContext | None) -> "RequestSpan":
        started = self._now()
        parent = Context() if caller is None else set_span_in_context(NonRecordingSpan(_remote(caller)), Context())
        span = self._tracer.start_span(journal.method, parent, SpanKind.SERVER, start_time=started)
        return RequestSpan(span, self._tracer, started, journal.started)

    def close(self) -> None:
        # A collector that takes the connection and says nothing would hold the SDK's own shutdown for half a minute.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)


class RequestSpan:
    """See `observer.Span`. `origin` by the journal's clock was `started` nanoseconds after the epoch, so a wall clock
    that is set meanwhile bends no span.
    """

    def __init__(self, span: Span, tracer: Tracer, started: int, origin: float) -> None:
        self._span = span
        self._tracer = tracer
        self._started = started
        self._origin = origin

    @property
    def context(self) -> TraceContext:
        context = self._span.get_span_context()
        flags = f"{context.trace_flags:02x}"
        return TraceContext(format_trace_id(context.trace_id), format_span_id(context.span_id), flags)

    def end(self, journal: Journal, endpoint: str | None, ended: float) -> None:
        if self._span.is_recording():
            if endpoint is not None:
                self._span.update_name(f"{journal.method} {endpoint}")
            self._span.set_attributes(http_attributes(journal, endpoint))
            if journal.asked is not None:
                self._tell(journal, journal.asked, ended)
            is_ours = journal.status >= HTTPStatus.INTERNAL_SERVER_ERROR or journal.status < HTTPStatus.BAD_REQUEST
            _fail(self._span, journal.error if is_ours else None)
        self._span.end(self._at(ended))

    def _tell(self, journal: Journal, asked: Asked, ended: float) -> None:
        """The spans below that of the HTTP request."""
        attributes = request_attributes(asked, journal.route, journal.endings)
        request = self._child(self._span, f"{asked.operation} {asked.model}", asked.arrival, attributes)
        _fail(request, journal.error)
        for phase in journal.phases:
            span = self._child(request, phase.name, phase.start)
            _fail(span, phase.error)
            self._close(span, phase.end)
        for index, ending in enumerate(journal.endings):
            if ending.submitted is not None:
                self._tell_choice(request, index, ending, asked.arrival)
        self._close(request, ended)

    def _tell_choice(self, request: Span, index: int, ending: Ending, arrival: float) -> None:
        """What the engine did, on the front end's clock: its spans of time end when it told of them."""
        start, end = arrival + (ending.submitted or 0.0), arrival + ending.e2e
        attributes = {"loramux.choice": index, **usage_attributes([ending])}
        engine = self._child(request, "engine", start, attributes)
        for moment in ending.preempted:
            engine.add_event("preempted", timestamp=self._at(arrival + moment))
        _fail(engine, ending.error)
        token = None if ending.first_token is None else arrival + ending.first_token
        scheduled = end if token is None else token
        if ending.prefill is not None:
            scheduled = max(start, scheduled - ending.prefill)
        queue = self._child(engine, "queue", start)
        loading = ending.loading or 0.0
        if ending.queue is not None and loading > LOADING_SECONDS:
            loaded = min(scheduled, max(start, scheduled - ending.queue + loading))
            queue.add_event("loaded", timestamp=self._at(loaded))
        self._close(queue, scheduled)
        if ending.prefill is not None:
            self._close(self._child(engine, "prefill", scheduled), token or end)
        if token is not None:
            self._close(self._child(engine, "decode", token), end)
        self._close(engine, end)

    def _child(self, parent: Span, name: str, start: float, attributes: Attributes | None = None) -> Span:
        context = set_span_in_context(parent, Context())
        return self._tracer.start_span(name, context, SpanKind.INTERNAL, attributes, start_time=self._at(start))

    def _close(self, span: Span, end: float) -> None:
        span.end(self._at(end))

    def _at(self, moment: float) -> int:
        return self._started + round((moment - self._origin) * 1e9)


def _fail(span: Span, code: str | None) -> None:
    """Ended by the error of this code, if there is one. A client that has left is none of ours."""
    if code is not None:
        span.set_attribute("error.type", code)
        if code not in CLIENTS:
            span.set_status(Status(StatusCode.ERROR, code))


def _remote(caller: TraceContext) -> SpanContext:
    return SpanContext(
        int(caller.trace_id, 16),
        int(caller.parent_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(int(caller.flags, 16)),
        trace_state=TraceState.from_header([caller.state]) if caller.state else TraceState(),
    )
