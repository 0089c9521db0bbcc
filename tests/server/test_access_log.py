"""The line that every request leaves, and what must not be in it."""

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fake_engine import REPLY
from fakes import Harness

from server.engine.config import RequestError
from server.engine.sequence import FinishReason, Output, Timings
from server.logs import formatter

Json = dict[str, Any]
PROMPT = "Tell me about the purple elephant"
BODY = {"model": "sql", "prompt": PROMPT}


class Lines(logging.Handler):
    """The lines of the server's own loggers, as JSON."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(formatter("json", "front"))
        self.all: list[Json] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.all.append(json.loads(self.format(record)))

    @property
    def access(self) -> list[Json]:
        return [line for line in self.all if line["logger"] == "server.access"]

    @property
    def last(self) -> Json:
        return self.access[-1]

    @contextmanager
    def gathered(self) -> Iterator["Lines"]:
        root = logging.getLogger()
        level = root.level
        root.addHandler(self)
        root.setLevel(logging.INFO)
        try:
            yield self
        finally:
            root.removeHandler(self)
            root.setLevel(level)


@pytest.fixture
def lines() -> Iterator[Lines]:
    with Lines().gathered() as lines:
        yield lines


async def test_an_answer(client: httpx.AsyncClient, lines: Lines) -> None:
    answer = await client.post("/v1/completions", json=BODY | {"n": 1}, headers={"x-request-id": "mine"})
    (line,) = lines.access
    assert line["message"] == "POST /v1/completions 200"
    expected = {
        "request_id": "mine",
        "tenant": "default",
        "router": "explicit",
        "adapters": ["sql:1"],
        "model": "sql",
        "operation": "text_completion",
        "status": 200,
        "outcome": "stop",
        "choices": 1,
        "prompt_tokens": answer.json()["usage"]["prompt_tokens"],
        "completion_tokens": answer.json()["usage"]["completion_tokens"],
        "queue_ms": 1.0,
        "prefill_ms": 2.0,
    }
    assert {name: line[name] for name in expected} == expected
    assert answer.json()["id"].endswith(line["generation"])
    parts = [line[f"{phase}_ms"] for phase in ("prompt", "route", "lease")]
    assert 0 < sum(parts) < line["first_token_ms"] <= line["duration_ms"]
    assert line["decode_ms"] > 0


async def test_a_stream_and_several_choices(client: httpx.AsyncClient, lines: Lines) -> None:
    await client.post("/v1/completions", json=BODY | {"stream": True, "n": 3, "max_tokens": 2})
    assert (lines.last["choices"], lines.last["outcome"], lines.last["completion_tokens"]) == (3, "length", 6)
    assert "queue_ms" not in lines.last
    assert lines.last["cached_tokens"] > 0


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "outcome"),
    [
        ("POST", "/v1/completions", {"model": "nobody", "prompt": "Hi"}, 404, "model_not_found"),
        ("POST", "/v1/completions", {"prompt": 7}, 400, "invalid_type"),
        ("POST", "/v1/chat/completions", {"model": "tiny", "messages": []}, 400, "invalid_value"),
        ("GET", "/v1/models", None, 200, "ok"),
        ("GET", "/v1/what%0aever", None, 404, "unknown_endpoint"),
        ("PUT", "/v1/models", None, 405, "method_not_allowed"),
    ],
)
async def test_other_outcomes(
    client: httpx.AsyncClient, lines: Lines, method: str, path: str, body: Json | None, status: int, outcome: str
) -> None:
    await client.request(method, path, json=body)
    (line,) = lines.access
    assert (line["status"], line["outcome"], line["method"]) == (status, outcome, method)


async def test_what_the_engine_ends(harness: Harness, client: httpx.AsyncClient, lines: Lines) -> None:
    harness.engine.refusal = RequestError("too large", param="lora.adapters", code="mix_too_large")
    await client.post("/v1/completions", json=BODY)
    assert (lines.last["outcome"], lines.last["completion_tokens"], lines.last["status"]) == ("mix_too_large", 0, 400)
    assert "first_token_ms" not in lines.last


async def test_an_error_within_a_stream(harness: Harness, client: httpx.AsyncClient, lines: Lines) -> None:
    harness.engine.gate.clear()
    harness.engine.hold_at = 2
    asking = asyncio.create_task(client.post("/v1/completions", json=BODY | {"stream": True}))
    while not harness.engine.num_waiting:
        await asyncio.sleep(0)
    harness.engine.kill()
    await asking
    assert (lines.last["status"], lines.last["outcome"], lines.last["completion_tokens"]) == (200, "engine_error", 2)
    (error,) = [line for line in lines.all if line["level"] == "error"]
    assert error["generation"] == lines.last["generation"]
    assert error["adapters"] == ["sql:1"]


async def test_time_in_the_queue_of_one_that_never_began(
    harness: Harness, client: httpx.AsyncClient, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def late(request: Any) -> Any:
        yield Output(request.id, finish_reason=FinishReason.TIMEOUT, timings=Timings(0.5, None, 0.25))

    with monkeypatch.context() as patch:
        patch.setattr(harness.engine, "submit", late)
        assert (await client.post("/v1/completions", json=BODY | {"timeout": 9})).status_code == 504
    assert (lines.last["outcome"], lines.last["queue_ms"]) == ("deadline_exceeded", 500.0)
    assert "prefill_ms" not in lines.last


async def test_probes_are_quiet_unless_they_fail(harness: Harness, client: httpx.AsyncClient, lines: Lines) -> None:
    for path in ("/health", "/ready", "/health/decode", "/metrics"):
        assert (await client.get(path)).status_code == 200
    assert not lines.access
    harness.engine.alive = False
    await client.get("/ready")
    assert lines.last["status"] == 503


async def test_a_client_that_leaves(harness: Harness, live: str, lines: Lines) -> None:
    harness.engine.gate.clear()
    harness.engine.hold_at = 1
    async with httpx.AsyncClient(base_url=live, timeout=60) as client:
        async with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as stream:
            await anext(stream.aiter_bytes())
        async with asyncio.timeout(60):
            while not lines.access:
                await asyncio.sleep(0.01)
            before = harness.engine.num_waiting
            asking = asyncio.create_task(client.post("/v1/completions", json=BODY))
            while harness.engine.num_waiting == before:
                await asyncio.sleep(0.01)
            asking.cancel()
            while len(lines.access) < 2:
                await asyncio.sleep(0.01)
    streamed, whole = sorted(lines.access, key=lambda line: int(line["status"]))
    assert (streamed["status"], streamed["outcome"]) == (200, "client_gone")
    assert (whole["status"], whole["outcome"]) == (499, "client_gone")


SECRET = "the-admin-key-that-nobody-reads"


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_neither_keys_nor_prompts_nor_signatures(
    make_harness: Callable[..., Harness], log_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With everything that a server says, of every kind of request that carries one."""
    harness = make_harness(admin_key=SECRET, api_key=["a-clients-own-key"])
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(log_format, "front", harness.settings.secrets))
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    signed = "https://bucket.example/adapter.zip?X-Amz-Signature=0123abcd"
    try:
        async with harness.client(headers={"authorization": f"Bearer {SECRET}"}) as client:
            stored = (await client.post("/admin/v1/tenants/default/keys", json={"label": "x"})).json()["key"]
            await client.post("/v1/completions", json=BODY)
            await client.post(
                "/v1/chat/completions", json={"model": "x", "messages": [{"role": "u", "content": PROMPT}]}
            )
            await client.get(f"/v1/models?api_key={SECRET}&cursor={stored}")
            await client.get(f"/v1/models/{stored}")
            await client.get(f"/v1/{SECRET}/x")
            await client.post("/admin/v1/adapters", json={"name": "far", "source": signed})
            await client.get("/v1/models", headers={"authorization": f"Bearer {stored[:-1]}x"})
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    said = capsys.readouterr().err
    assert said.count("server.access") == 8
    for secret in (SECRET, "a-clients-own-key", stored, stored[:-1], "0123abcd", PROMPT, "elephant", REPLY):
        assert secret not in said


async def test_prompts_are_logged_on_request(make_harness: Callable[..., Harness], lines: Lines) -> None:
    harness = make_harness(log_prompts=True)
    async with harness.client() as client:
        await client.post("/v1/completions", json=BODY)
        await client.post("/v1/completions", json=BODY | {"prompt": "a" * 250})
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "Größe?"}]}
        await client.post("/v1/chat/completions", json=chat)
    first, _, third = [line for line in lines.all if line["logger"] == "server.prompts"]
    assert json.loads(first["prompt"]) == [PROMPT]
    assert first["request_id"] == lines.access[0]["request_id"]
    assert json.loads(third["prompt"])[0]["content"] == "Größe?"
    harness.check_all_given_back()
