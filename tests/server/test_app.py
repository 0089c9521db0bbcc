"""The application as operators see it: health, keys, metrics, documentation, bugs."""

import asyncio
import threading
from collections.abc import Callable

import httpx
import pytest
from fake_engine import FakeEngine
from fakes import Harness
from transformers import PreTrainedTokenizerFast

from server.engine.config import EngineStats, RequestError

NAMES = (
    "requests_running",
    "requests_waiting",
    "request_success_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "queue_time_seconds",
    "prefill_time_seconds",
    "decode_time_seconds",
    "prompt_tokens_total",
    "generation_tokens_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "kv_cache_usage_ratio",
    "preemptions_total",
    "step_seconds",
    "batch_rows",
    "route_seconds",
    "route_total",
    "adapter_loads_total",
    "adapter_evictions_total",
    "adapters",
    "rank_pages",
)
GOOD = {"model": "tiny", "prompt": "Hi"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_health_follows_the_engine(client: httpx.AsyncClient, harness: Harness) -> None:
    for url in ("/health", "/ready"):
        assert (await client.get(url)).status_code == 200
    harness.engine.alive = False
    for url in ("/health", "/ready"):
        response = await client.get(url)
        assert response.status_code == 503
        assert response.headers["retry-after"].isdigit()


async def test_a_stuck_step_shows_in_its_own_probe(client: httpx.AsyncClient, harness: Harness) -> None:
    assert (await client.get("/health/decode")).status_code == 200
    harness.engine.stalled = True
    assert (await client.get("/health/decode")).status_code == 503
    assert (await client.head("/health/decode")).status_code == 503
    assert (await client.get("/health")).status_code == 200
    harness.engine.stalled, harness.engine.alive = False, False
    assert (await client.get("/health/decode")).status_code == 503


async def test_a_step_that_is_stuck_in_any_engine_shows(
    client: httpx.AsyncClient, harness: Harness, tokenizer: PreTrainedTokenizerFast
) -> None:
    second = FakeEngine(tokenizer)
    harness.engine.others.append(second)
    second.alive = False  # it is being restarted, and the other one serves
    for url in ("/health", "/ready", "/health/decode"):
        assert (await client.get(url)).status_code == 200
    second.alive = second.stalled = True
    assert (await client.get("/health/decode")).status_code == 503
    assert (await client.get("/ready")).status_code == 200


async def test_a_full_queue_sheds_what_comes_on_top(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness(max_waiting=2)
    harness.engine.gate.clear()
    async with harness.client() as client:
        waiting = [asyncio.create_task(client.post("/v1/completions", json=GOOD)) for _ in range(2)]
        async with asyncio.timeout(60):
            while harness.engine.num_waiting < 2:
                await asyncio.sleep(0)
        refused = await client.post("/v1/completions", json=GOOD)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert refused.headers["retry-after"].isdigit()
        harness.engine.gate.set()
        assert [(await task).status_code for task in waiting] == [200, 200]
        assert (await client.post("/v1/completions", json=GOOD)).status_code == 200
    harness.check_all_given_back()


async def test_requests_with_a_first_token_do_not_fill_the_queue(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness(max_waiting=1)
    harness.engine.gate.clear()
    harness.engine.hold_at = 1
    async with harness.client() as client:
        streaming = asyncio.create_task(client.post("/v1/completions", json=GOOD))
        async with asyncio.timeout(60):
            while harness.engine.num_waiting < 1:
                await asyncio.sleep(0)
        second = asyncio.create_task(client.post("/v1/completions", json=GOOD))
        async with asyncio.timeout(60):
            while harness.engine.num_waiting < 2:
                await asyncio.sleep(0)
        harness.engine.gate.set()
        assert [(await task).status_code for task in (streaming, second)] == [200, 200]


async def test_while_draining_new_work_is_refused(client: httpx.AsyncClient, harness: Harness) -> None:
    harness.services.generator.is_draining = True
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/ready")).status_code == 503
    response = await client.post("/v1/completions", json=GOOD)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "draining"
    assert response.headers["retry-after"].isdigit()


async def test_version(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": "0.1.0"}


async def test_a_dead_engine_is_503(client: httpx.AsyncClient, harness: Harness) -> None:
    harness.engine.alive = False
    for stream in (False, True):
        response = await client.post("/v1/completions", json=GOOD | {"stream": stream})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_unavailable"
        assert response.headers["retry-after"].isdigit()


@pytest.mark.parametrize(
    ("refusal", "status", "code", "param"),
    [
        (
            RequestError("too many pages", param="lora.adapters", code="mix_too_large"),
            400,
            "mix_too_large",
            "lora.adapters",
        ),
        (RequestError("cannot open /secret/adapter", code="adapter_unavailable"), 503, "adapter_unavailable", None),
        (RequestError("fork of /secret", code="constraint_unavailable"), 503, "constraint_unavailable", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_refuses(
    client: httpx.AsyncClient, harness: Harness, refusal: RequestError, status: int, code: str, param: str, stream: bool
) -> None:
    harness.engine.refusal = refusal
    response = await client.post("/v1/completions", json=GOOD | {"stream": stream})
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert "/secret" not in error["message"]
    assert harness.endings() == {"error": 1.0}


async def test_what_the_system_has_no_thread_for_is_503(client: httpx.AsyncClient) -> None:
    usual = threading.stack_size(1 << 50)  # no thread starts with that
    try:
        refused = await client.get("/admin/v1/tenants")
    finally:
        threading.stack_size(usual)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    assert refused.headers["retry-after"].isdigit()
    assert (await client.get("/admin/v1/tenants")).status_code == 200


async def test_a_bug_is_a_500_without_its_traceback(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise TypeError("bug at /secret/path")

    monkeypatch.setattr(harness.services.store.names, "models", fail)
    transport = httpx.ASGITransport(app=harness.asgi, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        response = await client.get("/v1/models")
    monkeypatch.undo()
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"]


async def test_a_bug_in_a_stream_is_an_event(
    client: httpx.AsyncClient, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise TypeError("bug at /secret/path")

    monkeypatch.setattr(harness.services.metrics, "gap", fail)
    response = await client.post("/v1/completions", json=GOOD | {"stream": True})
    monkeypatch.undo()
    assert response.status_code == 200
    last = response.text.strip().split("\n\n")[-1]
    assert last.startswith('data: {"error":')
    assert "secret" not in response.text


async def test_keys(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness(api_key=["user"], admin_key="boss", metrics_key="meter")
    async with harness.client() as client:
        for url in ("/health", "/ready", "/version", "/openapi.json", "/docs"):
            assert (await client.get(url)).status_code == 200
        for key, status in (("user", 200), ("boss", 200), ("meter", 401), ("nobody", 401)):
            response = await client.get("/v1/models", headers=bearer(key))
            assert response.status_code == status
        assert (await client.get("/v1/models", headers={"Authorization": "bearer user"})).status_code == 200
        for header in ("Basic user", "user", "Bearer", "Bearer  "):
            assert (await client.get("/v1/models", headers={"Authorization": header})).status_code == 401
        for url in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
            response = await client.post(url, content=b"{")
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        assert (await client.post("/v1/completions", json=GOOD, headers=bearer("user"))).status_code == 200
        for key, status in (("user", 401), ("boss", 200), ("meter", 200)):
            assert (await client.get("/metrics", headers=bearer(key))).status_code == status
        assert (await client.get("/metrics")).status_code == 401


async def test_public_metrics(make_harness: Callable[..., Harness]) -> None:
    async with make_harness(api_key=["user"], metrics_public=True).client() as client:
        assert (await client.get("/metrics")).status_code == 200


async def test_metrics_after_a_request(client: httpx.AsyncClient, harness: Harness) -> None:
    await client.post("/v1/completions", json=GOOD | {"model": "sql", "n": 2})
    harness.services.metrics.engine(EngineStats(running=1), 5.0)
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = response.text.splitlines()
    (request, _) = harness.engine.requests
    both = 'tenant="default"'
    assert f'loramux_request_success_total{{adapter="sql",finish_reason="stop",{both}}} 2.0' in lines
    assert f'loramux_prompt_tokens_total{{adapter="sql",{both}}} {float(len(request.prompt))}' in lines
    assert f'loramux_time_to_first_token_seconds_count{{adapter="sql",{both}}} 2.0' in lines
    assert f'loramux_queue_time_seconds_sum{{adapter="sql",{both}}} 0.002' in lines
    assert 'loramux_adapters{tier="disk"} 3.0' in lines
    assert 'loramux_route_total{outcome="routed",router="explicit"} 1.0' in lines


async def test_metrics_name_everything_that_is_there(client: httpx.AsyncClient) -> None:
    text = (await client.get("/metrics")).text
    for name in NAMES:
        assert f"# TYPE loramux_{name} " in text
    for name in ("lora_requests_info", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert f"# TYPE vllm:{name} gauge" in text


async def test_the_documentation_has_the_bodies(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    content = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    properties = content["application/json"]["schema"]["properties"]
    assert {"messages", "temperature", "lora", "max_completion_tokens"} <= properties.keys()
    assert "$ref" not in str(content)


async def test_body_limit_is_a_setting(client: httpx.AsyncClient) -> None:
    body, headers = b'{"prompt": "' + b"x" * (16 << 20) + b'"}', {"Content-Type": "application/json"}
    too_large = await client.post("/tokenize", content=body, headers=headers)
    assert (too_large.status_code, too_large.json()["error"]["code"]) == (413, "body_too_large")


async def test_a_wrong_method_is_told_all_that_are_right(client: httpx.AsyncClient) -> None:
    for path, methods in (
        ("/admin/v1/adapters", "GET, POST"),
        ("/admin/v1/adapters/sql", "DELETE, GET, PATCH"),
        ("/admin/v1/tenants/x", "DELETE, GET, PATCH"),
        ("/v1/completions", "POST"),
    ):
        refused = await client.put(path)
        assert (refused.status_code, refused.headers["allow"]) == (405, methods)
        assert refused.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("path", ["/health", "/ready", "/version"])
async def test_head_is_get_without_a_body(live: str, path: str) -> None:
    async with httpx.AsyncClient(base_url=live, timeout=60) as client:
        whole, head = await client.get(path), await client.head(path)
    assert (whole.status_code, head.status_code, head.content) == (200, 200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]
