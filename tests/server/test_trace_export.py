"""Spans leave over OTLP, as the standard variables say, and hold nobody up; and where there are none."""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fakes import Harness
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from server.config import ServeSettings, Settings
from server.otel import exporting
from server.tracing import TracingError, open_tracer

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
BODY = {"model": "sql", "prompt": "Hello"}


class Receiver:
    """An OTLP receiver over HTTP, on a port of its own. `silent`: it takes requests and never answers."""

    def __init__(self, silent: bool = False) -> None:
        receiver = self
        self.requests: list[tuple[str, dict[str, str], ExportTraceServiceRequest]] = []
        self.hold = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if silent:
                    receiver.hold.wait()
                told = ExportTraceServiceRequest.FromString(body)
                receiver.requests.append((self.path, dict(self.headers.items()), told))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> "Receiver":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hold.set()
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    @property
    def spans(self) -> list[Any]:
        scopes = [scope for *_, told in self.requests for each in told.resource_spans for scope in each.scope_spans]
        return [span for scope in scopes for span in scope.spans]


@pytest.fixture(autouse=True)
def _no_standard_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


async def test_spans_arrive_over_http(make_harness: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=secret")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    with Receiver() as receiver:
        made, tracer = make_harness(), exporting(f"{receiver.url}/v1/traces", "9.9")
        harness = Harness(made.store, made.engine._tokenizer, made.settings, tracer=tracer)
        async with harness.client() as client:
            await client.post("/v1/completions", json=BODY, headers=CALLER)
        await asyncio.to_thread(tracer.close)
        names = ["decode", "engine", "lease", "prefill", "prompt", "queue", "route"]
        assert sorted(span.name for span in receiver.spans) == [
            "POST /v1/completions",
            *names,
            "text_completion sql",
        ]
        path, headers, told = receiver.requests[0]
    assert (path, headers["authorization"]) == ("/v1/traces", "secret")
    resource = {each.key: each.value.string_value for each in told.resource_spans[0].resource.attributes}
    assert (resource["service.name"], resource["service.version"]) == ("loramux", "9.9")
    assert resource["deployment.environment"] == "test"
    assert {span.trace_id.hex() for span in receiver.spans} == {TRACE}


async def test_the_sampler_and_the_name_of_the_service_are_the_standard_ones(
    make_harness: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    with Receiver() as receiver:
        made, tracer = make_harness(), exporting(f"{receiver.url}/v1/traces", "9.9")
        harness = Harness(made.store, made.engine._tokenizer, made.settings, tracer=tracer)
        async with harness.client() as client:
            await client.get("/v1/models")
            await client.get("/v1/models", headers=CALLER)
        await asyncio.to_thread(tracer.close)
        assert len(receiver.spans) == 1
        ((_, _, told),) = receiver.requests
    resource = {each.key: each.value.string_value for each in told.resource_spans[0].resource.attributes}
    assert resource["service.name"] == "ours"


async def test_a_collector_that_is_silent_holds_nobody(
    make_harness: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.otel.CLOSE_SECONDS", 0.2)
    with Receiver(silent=True) as receiver:
        made, tracer = make_harness(), exporting(f"{receiver.url}/v1/traces", "9.9")
        harness = Harness(made.store, made.engine._tokenizer, made.settings, tracer=tracer)
        async with harness.client() as client:
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200
        await asyncio.to_thread(tracer.close)
        assert not receiver.requests


def test_without_an_endpoint_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who else might import it is a contract of the linter's."""

    def fail(name: str) -> None:
        pytest.fail(f"{name} is imported")

    monkeypatch.setattr("importlib.import_module", fail)
    assert open_tracer(None, "1") is None


def test_an_endpoint_without_the_extra_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "server.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(TracingError, match=r"pip install 'loramux\[tracing\]'"):
        open_tracer("http://collector:4318/v1/traces", "1")


def test_settings_are_given_to_the_tracer() -> None:
    assert Settings(serve=ServeSettings(otlp_endpoint="http://c:4318")).serve.otlp_endpoint == "http://c:4318/v1/traces"
