"""A server without keys, and what browsers send to it for pages of the web."""

from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from fake_engine import REPLY
from fakes import Harness
from openai import AsyncOpenAI

GOOD = {"model": "tiny", "prompt": "Hi"}
LOCAL = ("localhost", "localhost:8000", "127.0.0.1:8000", "127.1.2.3", "[::1]:8000", "LOCALHOST", "app.localhost:1")
FOREIGN = ("evil.example", "evil.example:8000", "localhost.evil.example", "0.0.0.0:8000", "10.0.0.1", "[2001:db8::1]:8")


@pytest.mark.parametrize("host", LOCAL)
async def test_its_own_names(client: httpx.AsyncClient, host: str) -> None:
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert (await client.get("/v1/models", headers=headers)).status_code == 200
    assert (await client.get("/docs", headers=headers)).status_code == 200
    assert REPLY in (await client.post("/v1/completions", json=GOOD, headers=headers)).text


@pytest.mark.parametrize("path", ["/v1/models", "/admin/v1/tenants", "/metrics", "/docs"])
@pytest.mark.parametrize("host", [*FOREIGN, "", "user@localhost", "localhost/x"])
async def test_names_that_were_made_to_mean_this_machine(client: httpx.AsyncClient, path: str, host: str) -> None:
    refused = await client.get(path, headers={"Host": host})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
    assert "the header Host names another one" in refused.json()["error"]["message"]
    assert refused.headers["x-request-id"]


@pytest.mark.parametrize("origin", [*(f"https://{host}" for host in FOREIGN), "null", "http://localhost@evil.example"])
async def test_scripts_of_other_pages(client: httpx.AsyncClient, harness: Harness, origin: str) -> None:
    refused = await client.post("/admin/v1/drain", headers={"Origin": origin})
    assert refused.status_code == 403
    assert "the header Origin names another one" in refused.json()["error"]["message"]
    assert not harness.services.generator.is_draining


async def test_a_body_says_what_it_is(client: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"id": "x"}'

    for content in (b'{"id": "x"}', chunks()):
        refused = await client.post("/admin/v1/tenants", content=content)
        assert (refused.status_code, refused.json()["error"]["code"]) == (415, "unsupported_media_type")
    refused = await client.post("/admin/v1/tenants", content=b'{"id": "x"}', headers={"Content-Type": "text/plain"})
    assert refused.status_code == 415


async def test_stock_clients(live: str) -> None:
    async with AsyncOpenAI(base_url=f"{live}/v1", api_key="none") as client:
        answer = await client.completions.create(model="tiny", prompt="Hi")
    assert answer.choices[0].text == REPLY
    async with httpx.AsyncClient(base_url=live.replace("127.0.0.1", "localhost"), timeout=60) as plain:
        headers = {"Content-Type": "application/json", "User-Agent": "curl/8", "Accept": "*/*"}
        answered = await plain.post("/v1/completions", content=b'{"model": "tiny", "prompt": "Hi"}', headers=headers)
    assert REPLY in answered.text


@pytest.mark.parametrize("settings", [{"api_key": ("k",)}, {"admin_key": "k"}, {"insecure": True}])
async def test_servers_that_others_may_reach(make_harness: Callable[..., Harness], settings: dict[str, object]) -> None:
    async with make_harness(**settings).client(headers={"Authorization": "Bearer k"}) as client:
        headers = {"Host": "models.example", "Origin": "https://chat.example"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
