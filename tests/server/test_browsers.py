"""Pages of other origins, and paths that are nowhere."""

from collections.abc import Callable

import httpx
import pytest
from fakes import Harness
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from adapters_store.store import AdapterStore
from server.config import HttpSettings, ServeSettings, Settings

APP = "https://app.example.com"
ASKING = {"Origin": APP, "Access-Control-Request-Method": "POST"}
GOOD = {"model": "tiny", "prompt": "Hi"}


@pytest.fixture
def make_open(store: AdapterStore, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Harness]:
    """`make_open(origin, ..., **serve settings)`."""

    def make(*origins: str, **serve: object) -> Harness:
        settings = Settings(serve=ServeSettings(**serve), http=HttpSettings(cors_origins=origins))
        return Harness(store, tokenizer, settings)

    return make


async def test_no_page_may_call_by_default(make_harness: Callable[..., Harness]) -> None:
    async with make_harness(api_key=("mine",)).client() as client:
        asked = await client.options("/v1/completions", headers=ASKING)
        assert asked.status_code == 405
        assert not [name for name in asked.headers if name.startswith("access-control")]


async def test_pages_of_the_settings_may_call(make_open: Callable[..., Harness]) -> None:
    async with make_open(APP, api_key=("mine",)).client() as client:
        headers = ASKING | {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}
        asked = await client.options("/v1/chat/completions", headers=headers)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == APP
        assert "authorization" in asked.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in asked.headers
        refused = await client.options("/v1/chat/completions", headers=headers | {"Origin": "https://evil.example"})
        assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (400, False)
        # A page reads errors and streams too, and the headers that are for it.
        for body, key in ((GOOD, "mine"), (GOOD | {"stream": True}, "mine"), (GOOD, "wrong"), ({}, "mine")):
            answer = await client.post(
                "/v1/completions", json=body, headers={"Origin": APP, "Authorization": f"Bearer {key}"}
            )
            assert answer.headers["access-control-allow-origin"] == APP
            assert "x-loramux-route" in answer.headers["access-control-expose-headers"]


async def test_a_server_without_keys_lets_only_named_pages_in(make_open: Callable[..., Harness]) -> None:
    for origins, status in (((APP,), 200), (("*",), 403)):
        async with make_open(*origins).client() as client:
            assert (await client.post("/v1/completions", json=GOOD, headers={"Origin": APP})).status_code == status
            evil = await client.post("/v1/completions", json=GOOD, headers={"Origin": "https://evil.example"})
            assert evil.status_code == 403


@pytest.mark.parametrize("origin", ["app.example.com", "https://app.example.com/", "ftp://x", ""])
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(ValidationError, match="is no origin"):
        HttpSettings(cors_origins=(origin,))


@pytest.mark.parametrize(
    ("method", "path", "says"),
    [
        ("POST", "/v1/responses", "this server has no /v1/responses: use /v1/chat/completions"),
        ("GET", "/v1/responses/resp_1", "this server has no /v1/responses"),
        ("POST", "/v1/audio/transcriptions", "reads and writes text"),
        ("POST", "/v1/images/generations", "reads and writes text"),
        ("GET", "/v1/files", "/admin/v1/adapters"),
        ("POST", "/v1/fine_tuning/jobs", "loramux train"),
        ("POST", "/v1/moderations", "no model here moderates"),
        ("GET", "/v1/batches", "share forward passes"),
        ("POST", "/chat/completions", "base URL of OpenAI's API ends with /v1"),
        ("POST", "/v1/v1/chat/completions", "twice"),
        ("POST", "/v1/messages", "/v1/chat/completions"),
        ("POST", "/generate", "/v1/completions, with `adapter_id`"),
        ("GET", "/ping", "this server has no /ping: use /health"),
        ("POST", "/api/chat", "/v1/chat/completions"),
        ("POST", "/v1/completions/", "the path ends with a slash"),
        ("GET", "/console/", "the path ends with a slash"),
        ("GET", "/v1/", "GET /docs lists all"),
        ("GET", "/nowhere", "GET /docs lists all"),
        ("GET", "/", "GET /docs lists all"),
    ],
)
async def test_endpoints_that_are_not_here(client: httpx.AsyncClient, method: str, path: str, says: str) -> None:
    answer = await client.request(method, path)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", "unknown_endpoint", None)
    assert says in error["message"]
    assert answer.headers["x-request-id"]
