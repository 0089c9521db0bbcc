"""Spans of requests: how they hang together, when they were, what they say."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fakes import Harness
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider, sampling
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, TraceFlags, format_span_id, format_trace_id

from server.engine.config import RequestError
from server.engine.sequence import FinishReason, Output, Timings
from server.otel import OtelTracer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
BODY = {"model": "sql", "prompt": "Hello world, this is naïve. " * 3}


class Recorded:
    """A tracer that keeps its spans."""

    def __init__(self, sampler: sampling.Sampler = sampling.DEFAULT_ON) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler, shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = OtelTracer(self.provider, "1.2.3", lambda: 10**18)

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self.exporter.get_finished_spans()

    def one(self, name: str) -> ReadableSpan:
        (found,) = [span for span in self.spans if span.name == name]
        return found


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    recorded = Recorded()
    yield recorded
    recorded.provider.shutdown()


@pytest.fixture
def traced(make_harness: Callable[..., Harness], recorded: Recorded) -> Iterator[Harness]:
    harness = make_harness()
    harness = Harness(harness.store, harness.engine._tokenizer, harness.settings, tracer=recorded.tracer)
    yield harness
    harness.check_all_given_back()


@pytest.fixture
async def client(traced: Harness) -> Any:
    async with traced.client() as client:
        yield client


def tree(spans: Sequence[ReadableSpan]) -> dict[str, list[str]]:
    """Names of the children by name of the parent, in the order of their beginning. The root's parent is ''."""
    names = {span.context.span_id: span.name for span in spans}
    found: dict[str, list[str]] = {}
    for span in sorted(spans, key=lambda span: (span.start_time, span.end_time)):
        parent = "" if span.parent is None else names.get(span.parent.span_id, "")
        found.setdefault(parent, []).append(span.name)
    return found


async def test_one_trace_from_http_to_the_last_token(client: httpx.AsyncClient, recorded: Recorded) -> None:
    answer = await client.post("/v1/completions", json=BODY | {"seed": 7}, headers=CALLER | {"x-request-id": "mine"})
    assert tree(recorded.spans) == {
        "": ["POST /v1/completions"],
        "POST /v1/completions": ["text_completion sql"],
        "text_completion sql": ["prompt", "route", "lease", "engine"],
        "engine": ["queue", "prefill", "decode"],
    }
    root = recorded.one("POST /v1/completions")
    assert root.kind is SpanKind.SERVER
    assert (format_trace_id(root.context.trace_id), format_span_id(root.parent.span_id)) == (TRACE, PARENT)
    assert root.parent.is_remote
    assert root.context.trace_state.to_header() == "vendor=1"
    assert answer.headers["traceresponse"] == f"00-{TRACE}-{format_span_id(root.context.span_id)}-01"
    assert {span.context.trace_id for span in recorded.spans} == {root.context.trace_id}
    assert dict(root.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "url.path": "/v1/completions",
        "loramux.request_id": "mine",
        "loramux.tenant": "default",
    }
    usage, said = answer.json()["usage"], dict(recorded.one("text_completion sql").attributes)
    assert said.pop("gen_ai.response.time_to_first_chunk") > 0
    assert said.pop("loramux.adapters.digests") == (answer.json()["lora"]["adapters"][0]["digest"],)
    assert said == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "loramux",
        "gen_ai.request.model": "sql",
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 7,
        "gen_ai.response.id": answer.json()["id"],
        "gen_ai.response.model": "sql",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 16,
        "loramux.router": "explicit",
        "loramux.route.outcome": "routed",
        "loramux.route.cached": False,
        "loramux.composition": "mixture",
        "loramux.adapters.count": 1,
        "loramux.adapters.names": ("sql",),
        "loramux.adapters.weights": (1.0,),
    }
    assert all(span.status.status_code is StatusCode.UNSET for span in recorded.spans)


async def test_times_lie_within_those_of_the_parent(client: httpx.AsyncClient, recorded: Recorded) -> None:
    await client.post("/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]})
    by_id = {span.context.span_id: span for span in recorded.spans}
    for span in recorded.spans:
        assert span.start_time <= span.end_time
        if span.parent is not None:
            parent = by_id[span.parent.span_id]
            assert parent.start_time <= span.start_time <= span.end_time <= parent.end_time
    queue, prefill, decode = (recorded.one(name) for name in ("queue", "prefill", "decode"))
    assert queue.end_time == prefill.start_time
    assert prefill.end_time == decode.start_time
    assert recorded.one("POST /v1/chat/completions").start_time == 10**18
    assert recorded.one("chat tiny").attributes["loramux.router"] == "base"


async def test_choices_have_spans_of_their_own(client: httpx.AsyncClient, recorded: Recorded) -> None:
    lora = {"adapters": [{"name": "sql", "weight": 0.5}, {"name": "german", "weight": -2}]}
    body = {"model": "tiny", "prompt": ["Hi", "Ho"], "n": 2, "max_tokens": 3, "stream": True, "lora": lora}
    await client.post("/v1/completions", json=body)
    engines = [span for span in recorded.spans if span.name == "engine"]
    assert sorted(span.attributes["loramux.choice"] for span in engines) == [0, 1, 2, 3]
    said = recorded.one("text_completion tiny").attributes
    assert said["gen_ai.response.finish_reasons"] == ("length",) * 4
    assert said["gen_ai.usage.output_tokens"] == 12
    assert said["gen_ai.request.choice.count"] == 2
    assert (said["loramux.adapters.names"], said["loramux.adapters.weights"]) == (("sql", "german"), (0.5, -2.0))


@pytest.mark.parametrize("sampled", ["00", "01"])
async def test_the_caller_says_whether(client: httpx.AsyncClient, recorded: Recorded, sampled: str) -> None:
    answer = await client.get("/v1/models", headers={"traceparent": f"00-{TRACE}-{PARENT}-{sampled}"})
    assert len(recorded.spans) == int(sampled)
    assert answer.headers["traceresponse"].startswith(f"00-{TRACE}-")
    assert answer.headers["traceresponse"].endswith(sampled)


async def test_what_is_not_sampled_costs_no_spans(make_harness: Callable[..., Harness]) -> None:
    recorded, made = Recorded(sampling.DEFAULT_OFF), make_harness()
    harness = Harness(made.store, made.engine._tokenizer, made.settings, tracer=recorded.tracer)
    async with harness.client() as client:
        answer = await client.post("/v1/completions", json=BODY)
    assert not int(answer.headers["traceresponse"][-2:], 16) & TraceFlags.SAMPLED
    assert not recorded.spans


async def test_errors_say_which(traced: Harness, client: httpx.AsyncClient, recorded: Recorded) -> None:
    await client.post("/v1/completions", json=BODY | {"model": "nobody"})
    root, route = recorded.one("POST /v1/completions"), recorded.one("route")
    assert (root.attributes["error.type"], root.attributes["http.response.status_code"]) == ("model_not_found", 404)
    assert root.status.status_code is StatusCode.UNSET  # the caller's mistake
    assert (route.status.status_code, route.attributes["error.type"]) == (StatusCode.ERROR, "model_not_found")
    recorded.exporter.clear()
    traced.engine.alive = False
    await client.post("/v1/completions", json=BODY)
    assert recorded.one("POST /v1/completions").status.status_code is StatusCode.ERROR
    assert recorded.one("text_completion sql").attributes["error.type"] == "engine_unavailable"
    recorded.exporter.clear()
    traced.engine.alive, traced.engine.refusal = True, RequestError("no", code="mix_too_large")
    await client.post("/v1/completions", json=BODY)
    engine = recorded.one("engine")
    assert (engine.status.status_code, engine.status.description) == (StatusCode.ERROR, "mix_too_large")
    assert tree(recorded.spans)["engine"] == ["queue"]


async def test_an_engine_that_dies_within_a_stream(
    traced: Harness, client: httpx.AsyncClient, recorded: Recorded
) -> None:
    traced.engine.gate.clear()
    traced.engine.hold_at = 2
    asking = asyncio.create_task(client.post("/v1/completions", json=BODY | {"stream": True}))
    while not traced.engine.num_waiting:
        await asyncio.sleep(0)
    traced.engine.kill()
    await asking
    root, engine = recorded.one("POST /v1/completions"), recorded.one("engine")
    assert root.attributes["http.response.status_code"] == 200
    for span in (root, engine, recorded.one("text_completion sql")):
        assert (span.status.status_code, span.attributes["error.type"]) == (StatusCode.ERROR, "engine_error")
    assert engine.attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert engine.attributes["gen_ai.usage.output_tokens"] == 2
    assert tree(recorded.spans)["engine"] == ["queue", "prefill", "decode"]


async def test_a_client_that_leaves_is_no_error(traced: Harness, client: httpx.AsyncClient, recorded: Recorded) -> None:
    traced.engine.gate.clear()
    left = asyncio.Event()
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not messages:
            messages.append({})
            return {"type": "http.request", "body": b'{"model": "sql", "prompt": "Hi", "stream": true}'}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        messages.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    asking = asyncio.create_task(traced.asgi(scope, receive, send))
    while not traced.engine.num_waiting:
        await asyncio.sleep(0)
    left.set()
    await asking
    root, engine = recorded.one("POST /v1/completions"), recorded.one("engine")
    assert (root.status.status_code, root.attributes["error.type"]) == (StatusCode.UNSET, "client_gone")
    assert engine.attributes["gen_ai.response.finish_reasons"] == ("abort",)
    assert client is not None


@dataclass(frozen=True)
class Told:
    """What the engine tells of a request at its end."""

    reason: FinishReason
    timings: Timings
    names: list[str]
    events: list[str]


@pytest.mark.parametrize(
    "told",
    [
        Told(FinishReason.TIMEOUT, Timings(0.5, None, 0.5), ["queue"], ["loaded"]),
        Told(FinishReason.TIMEOUT, Timings(0.5, 0.25), ["queue", "prefill"], []),
        Told(FinishReason.TIMEOUT, Timings(0.5, 0.25, 0.1, (0.2, 0.1)), ["queue", "prefill"], ["loaded", "preempted"]),
    ],
)
async def test_what_the_engine_tells_of_one_whose_time_is_over(
    traced: Harness, client: httpx.AsyncClient, recorded: Recorded, monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    async def submit(request: Any) -> Any:
        yield Output(request.id, finish_reason=told.reason, timings=told.timings)

    with monkeypatch.context() as patch:
        patch.setattr(traced.engine, "submit", submit)
        assert (await client.post("/v1/completions", json=BODY)).status_code == 504
    assert tree(recorded.spans)["engine"] == told.names
    assert recorded.one("engine").attributes["error.type"] == "deadline_exceeded"
    events = [event.name for span in recorded.spans for event in span.events]
    assert sorted(set(events)) == told.events
    assert events.count("preempted") == len(told.timings.preempted)


async def test_other_requests_have_one_span(client: httpx.AsyncClient, recorded: Recorded) -> None:
    await client.get("/v1/models/sql")
    await client.get("/no/such/thing")
    await client.get("/health")
    await client.get("/metrics")
    assert [span.name for span in recorded.spans] == ["GET /v1/models/{model:path}", "GET"]


async def test_a_tracer_with_a_bug_takes_no_answer_away(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise TypeError("bug")

    monkeypatch.setattr("server.otel.request_attributes", fail)
    assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    assert "a request could not be traced" in caplog.text
