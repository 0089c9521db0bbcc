"""Adapters come and go, and are gone in the end."""

import asyncio
import re
from pathlib import Path

import httpx
import pytest

from loadtests.churn import churn
from loadtests.upload import PARTS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file in PARTS.values():
        (tmp_path / file).write_text("{}")
    return tmp_path


async def test_what_was_registered_is_deleted_in_the_end(folder: Path) -> None:
    there: set[str] = set()
    calls = 0
    enough = asyncio.Event()

    async def server(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        if calls == 40:
            enough.set()
        if request.method == "DELETE":
            there.remove(request.url.path.rpartition("/")[2])
            return httpx.Response(200)
        fields = (await request.aread()).decode()
        found = re.search(r'name="name"\r\n\r\n(\S+)', fields)
        assert found is not None
        is_new = 'name="replace"\r\n\r\nfalse' in fields
        assert is_new != (found[1] in there)
        there.add(found[1])
        return httpx.Response(201)

    async with httpx.AsyncClient(transport=httpx.MockTransport(server), base_url="http://test") as client:
        task = asyncio.create_task(churn(client, [folder], rate=1e5))
        await enough.wait()
        task.cancel()
        done = await task
    assert there == set()
    assert done.registered == done.deleted > 0
    assert done.replaced > 0
    assert done.failed == {}


async def test_refusals_are_counted(folder: Path) -> None:
    refused = asyncio.Event()

    def server(_: httpx.Request) -> httpx.Response:
        refused.set()
        return httpx.Response(403)

    async with httpx.AsyncClient(transport=httpx.MockTransport(server), base_url="http://test") as client:
        task = asyncio.create_task(churn(client, [folder], rate=1e5))
        await refused.wait()
        await asyncio.sleep(0)
        task.cancel()
        done = await task
    assert done.failed["POST 403"] >= 1
    assert (done.registered, done.deleted) == (0, 0)
