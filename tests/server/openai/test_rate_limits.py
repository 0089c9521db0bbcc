"""Keys and quotas over HTTP, and what OpenAI's own client makes of them."""

import itertools
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from fake_engine import REPLY
from fakes import Harness
from openai import AsyncOpenAI
from starlette.routing import Route

from adapters_store.registry import Quotas, TenantRow

NUMBERS = itertools.count()
GOOD = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 2}
OPEN = {"/health", "/health/decode", "/ready", "/version", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}
"""What needs no key; `/metrics` has rules of its own."""


class Account:
    """A new tenant with a key, and quotas under a clock that the test moves."""

    def __init__(self, harness: Harness) -> None:
        self.id = f"limited{next(NUMBERS)}"
        self.key = ""
        self.now = 100.0
        self._harness = harness
        harness.services.quotas.clock = lambda: self.now

    async def open(self, **quotas: Any) -> "Account":
        await self._harness.services.accounts.create_tenant(TenantRow(self.id, quotas=Quotas(**quotas)))
        _, self.key = await self._harness.services.accounts.create_key(self.id)
        return self

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


@pytest.fixture
def account(harness: Harness) -> Account:
    return Account(harness)


def limits(response: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name.startswith("x-ratelimit-")}


async def test_every_endpoint_needs_a_key(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness(admin_key="boss", api_key=("mine",))
    async with harness.client() as client:
        paths = harness.app.openapi()["paths"]
        calls = [(method, path) for path, methods in paths.items() for method in methods if path not in OPEN]
        assert ("post", "/v1/chat/completions") in calls
        assert ("get", "/v1/models") in calls
        for method, path in calls:
            url = path.replace("{", "").replace("}", "").replace(":path", "")
            for headers in ({}, {"Authorization": "Bearer lm-" + "a" * 12 + "-" + "b" * 43}, {"Authorization": "x"}):
                response = await client.request(method, url, headers=headers)
                assert response.status_code == 401, (method, url, headers)
                error = response.json()["error"]
                assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        shown = {route.path for route in harness.app.routes if isinstance(route, Route)}
        for path in shown & OPEN:
            assert (await client.get(path)).status_code == 200, path
        for key in ("boss", "mine"):
            response = await client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert response.status_code == 200


async def test_a_stored_key_means_its_tenant(make_harness: Callable[..., Harness]) -> None:
    for settings in ({}, {"admin_key": "boss"}):
        harness = make_harness(**settings)
        account = await Account(harness).open()
        async with harness.client() as client:
            answer = await client.post("/v1/completions", json=GOOD, headers=account.headers)
            assert answer.status_code == 200
            assert limits(answer) == {}
            (row,) = await harness.services.accounts.keys(account.id)
            await harness.services.accounts.revoke_key(account.id, row.id)
            refused = await client.post("/v1/completions", json=GOOD, headers=account.headers)
            assert refused.status_code == 401
        (request,) = harness.engine.requests
        assert request.tenant == account.id


async def test_requests_a_second(client: httpx.AsyncClient, harness: Harness, account: Account) -> None:
    await account.open(requests_per_second=2)
    answers = [await client.post("/v1/completions", json=GOOD, headers=account.headers) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [limits(answer) for answer in answers] == [
        {
            "x-ratelimit-limit-requests": "2",
            "x-ratelimit-remaining-requests": remaining,
            "x-ratelimit-reset-requests": reset,
        }
        for remaining, reset in (("1", "500ms"), ("0", "1s"), ("0", "1s"))
    ]
    refused = answers[-1]
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["x-request-id"]
    error = refused.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "quota_requests", None)
    assert account.id in error["message"]
    account.now += 0.5
    streamed = await client.post("/v1/completions", json=GOOD | {"stream": True}, headers=account.headers)
    assert streamed.status_code == 200
    assert limits(streamed)["x-ratelimit-remaining-requests"] == "0"
    samples = [
        sample
        for family in harness.services.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "loramux_quota_rejections_total"
    ]
    assert [(sample.labels, sample.value) for sample in samples] == [({"tenant": account.id, "kind": "requests"}, 1.0)]


async def test_other_answers_show_the_limits_too(client: httpx.AsyncClient, account: Account) -> None:
    await account.open(requests_per_second=5, tokens_per_minute=600)
    for method, url, body, status, remaining in (
        ("GET", "/v1/models", None, 200, "5"),
        ("POST", "/tokenize", {"prompt": "Hi"}, 200, "4"),
        ("POST", "/v1/completions", {"prompt": "Hi", "temperature": 9}, 400, "3"),
        ("POST", "/v1/completions", GOOD | {"model": "nobody"}, 404, "2"),
        ("POST", "/v1/chat/completions", b"{", 400, "1"),
    ):
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        headers = account.headers | {"Content-Type": "application/json"}
        response = await client.request(method, url, headers=headers, **content)  # type: ignore[arg-type]
        assert response.status_code == status
        assert limits(response) == {
            "x-ratelimit-limit-requests": "5",
            "x-ratelimit-remaining-requests": remaining,
            "x-ratelimit-reset-requests": f"{(5 - int(remaining)) * 200}ms",
            "x-ratelimit-limit-tokens": "600",
            "x-ratelimit-remaining-tokens": "600",
            "x-ratelimit-reset-tokens": "0ms",
        }
    await client.post("/detokenize", json={"tokens": [5]}, headers=account.headers)
    refused = await client.post("/tokenize", json={"prompt": "Hi"}, headers=account.headers)
    assert refused.json()["error"]["code"] == "quota_requests"
    assert limits(await client.get("/v1/models")) == {}  # the admin has none


async def test_a_request_beyond_the_quota_is_refused_before_its_body_is_parsed(
    client: httpx.AsyncClient, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    await account.open(requests_per_second=2)
    headers = account.headers | {"Content-Type": "application/json"}
    for _ in range(2):
        assert (await client.post("/v1/completions", content=b"{", headers=headers)).status_code == 400
    monkeypatch.setattr("server.body.parse_object", None)
    for url in ("/v1/completions", "/v1/chat/completions"):
        assert (await client.post(url, json=GOOD, headers=account.headers)).status_code == 429


@pytest.mark.parametrize("url", ["/admin/v1/adapters", "/admin/v1/adapters/sql", "/admin/v1/usage"])
async def test_looking_counts(client: httpx.AsyncClient, account: Account, url: str) -> None:
    await account.open(requests_per_second=1)
    answers = [await client.get(url, headers=account.headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]


async def test_every_sequence_needs_a_place(client: httpx.AsyncClient, harness: Harness, account: Account) -> None:
    await account.open(concurrency=4)
    for body in ({"n": 5}, {"prompt": ["Hi"] * 5}, {"prompt": ["Hi"] * 3, "n": 2}):
        refused = await client.post("/v1/completions", json=GOOD | body, headers=account.headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_concurrency")
        assert refused.headers["x-should-retry"] == "false"
    assert not harness.engine.requests
    body = GOOD | {"prompt": ["Hi"] * 2, "n": 2}
    assert (await client.post("/v1/completions", json=body, headers=account.headers)).status_code == 200


async def test_tokens_a_minute(client: httpx.AsyncClient, account: Account) -> None:
    await account.open(tokens_per_minute=6)
    answer = await client.post("/v1/completions", json=GOOD, headers=account.headers)
    assert answer.json()["usage"]["total_tokens"] == 5
    assert limits(answer)["x-ratelimit-remaining-tokens"] == "1"
    refused = await client.post("/v1/completions", json=GOOD, headers=account.headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_tokens")
    assert refused.headers["retry-after"] == "20"
    assert "x-should-retry" not in refused.headers
    account.now += 20
    assert (await client.post("/v1/completions", json=GOOD, headers=account.headers)).status_code == 200
    account.now += 1000
    never = await client.post("/v1/completions", json=GOOD | {"prompt": [5] * 7}, headers=account.headers)
    assert (never.status_code, never.headers["x-should-retry"]) == (429, "false")


async def test_requests_at_once(live: str, harness: Harness, account: Account) -> None:
    await account.open(concurrency=1)
    other = await Account(harness).open(concurrency=1)
    harness.engine.gate.clear()
    async with httpx.AsyncClient(base_url=live, timeout=60) as client:
        body = GOOD | {"stream": True}
        harness.engine.hold_at = 1
        async with client.stream("POST", "/v1/completions", json=body, headers=account.headers) as stream:
            assert stream.status_code == 200
            refused = await client.post("/v1/completions", json=GOOD, headers=account.headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_concurrency")
            assert refused.headers["retry-after"] == "1"
            assert harness.services.quotas.running(other.id) == 0
            async with client.stream("POST", "/v1/completions", json=body, headers=other.headers) as second:
                assert second.status_code == 200
                harness.engine.gate.set()
                assert (await second.aread()).endswith(b"[DONE]\n\n")
            assert (await stream.aread()).endswith(b"[DONE]\n\n")
        again = await client.post("/v1/completions", json=GOOD, headers=account.headers)
        assert again.status_code == 200


class TestOfficialClient:
    async def test_it_waits_as_long_as_told(
        self, live: str, harness: Harness, account: Account, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await account.open(requests_per_second=0.2)
        slept: list[float] = []

        async def sleep(seconds: float) -> None:
            slept.append(seconds)
            account.now += seconds

        monkeypatch.setattr("openai._base_client.anyio.sleep", sleep)
        async with AsyncOpenAI(base_url=f"{live}/v1", api_key=account.key, max_retries=1) as client:
            for _ in range(3):
                answer = await client.completions.create(model="tiny", prompt="Hi")
                assert answer.choices[0].text == REPLY
        assert slept == [5.0, 5.0]
        assert len(harness.engine.requests) == 3

    async def test_its_error_has_code_and_headers(self, live: str, account: Account) -> None:
        await account.open(requests_per_second=0.2)
        async with AsyncOpenAI(base_url=f"{live}/v1", api_key=account.key, max_retries=0) as client:
            first = await client.completions.with_raw_response.create(model="tiny", prompt="Hi")
            assert first.headers["x-ratelimit-remaining-requests"] == "0"
            with pytest.raises(openai.RateLimitError) as refused:
                await client.completions.create(model="tiny", prompt="Hi")
        assert (refused.value.code, refused.value.type) == ("quota_requests", "rate_limit_error")
        assert refused.value.response.headers["retry-after"] == "5"

    async def test_it_does_not_try_again_what_can_never_be(self, live: str, harness: Harness, account: Account) -> None:
        await account.open(tokens_per_minute=2)
        async with AsyncOpenAI(base_url=f"{live}/v1", api_key=account.key, max_retries=5) as client:
            with pytest.raises(openai.RateLimitError, match="less than"):
                await client.completions.create(model="tiny", prompt=[5, 6, 7])
        rejections = harness.services.metrics._quota_rejections.labels(account.id, "tokens")._value.get()
        assert rejections == 1.0
