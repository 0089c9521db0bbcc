"""Adapters that cannot be served, and uploads that end too soon: each its own answer, and nothing is left of it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from broken import BROKEN
from fakes import Harness
from world import World, error_of, files_of, open_world

URL = "/admin/v1/adapters"


@pytest.fixture
async def small(make_world: Callable[..., Harness], tmp_path: Path) -> AsyncIterator[World]:
    """A server that takes adapters of up to 4000 bytes."""
    async with open_world(make_world({"max_adapter_bytes": 4000}, uploads=2), tmp_path) as world:
        yield world


def left_behind(world: World) -> list[str]:
    """Files of adapters anywhere, and names."""
    files = [str(path) for path in (world.folder / "blobs").rglob("*") if path.is_file() and len(path.name) == 64]
    names = [model.name for model in world.harness.store.registry.models("default").items]
    return files + names + [str(path) for path in world.staged()]


async def test_each_kind_has_its_code(small: World) -> None:
    for kind, (broken, status, code) in BROKEN.items():
        response = await small.admin.post(URL, data={"name": "sql"}, files=broken(small.make(0)))
        error = error_of(response)
        assert (response.status_code, error["code"]) == (status, code), (kind, response.text)
        assert len(error["message"]) > 20
        assert "\n" not in error["message"]
        assert error["type"] == "invalid_request_error"
    assert left_behind(small) == []
    assert (await small.upload(small.admin, "sql", 0)).status_code == 201


async def test_broken_ones_in_a_row_disturb_nothing(small: World) -> None:
    await small.added(small.admin, "sql", 0)
    running = True

    async def load() -> int:
        count = 0
        while running:
            response = await small.use(small.admin, "sql")
            assert response.status_code == 200, response.text
            assert response.json()["choices"][0]["text"] == "Hello world,"
            count += 1
        return count

    loads = [asyncio.create_task(load()) for _ in range(3)]
    assert len(BROKEN) >= 25
    for broken, status, _ in BROKEN.values():
        response = await small.admin.post(URL, data={"name": "new"}, files=broken(small.make(1)))
        assert response.status_code == status
    running = False
    assert all([await each > 0 for each in loads])
    assert small.harness.services.catalog.slots.taken == 0
    assert (await small.admin.get(URL)).json()["next"] is None
    await small.added(small.admin, "new", 1)


NO_BODIES = [
    ("multipart/form-data", b"", 400, "bad_upload"),
    ("multipart/form-data; boundary=x", b"", 400, "bad_upload"),
    ("multipart/form-data; boundary=x", b"--y\r\n", 400, "bad_upload"),
    ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb', 400, "bad_upload"),
    ("text/plain", b"name=sql", 415, "unsupported_media_type"),
    ("application/json", b"", 400, "invalid_json"),
    ("application/json", b'{"name": "a", "name": "b", "source": "hf://a/b"}', 400, "duplicate_field"),
    ("application/json", b'{"name": "a", "source": 5}', 400, "invalid_type"),
    ("application/json", b'{"name": "a"}', 400, "missing_required_parameter"),
    ("application/json", b'{"name": "a", "source": "hf://a/b", "rank": 5}', 400, "unknown_parameter"),
    ("application/json", b'{"name": "a", "source": "ftp://a/b"}', 400, "bad_source"),
    ("application/json", b'{"name": "a", "source": "/etc"}', 400, "bad_source"),
    ("application/json", b'{"name": "a", "source": "file:///etc"}', 403, "source_not_allowed"),
    ("application/json", b'{"name": "a", "source": "s3://bucket/x"}', 403, "source_not_allowed"),
    ("application/json", b'{"name": "a", "source": "https://example.com/x"}', 403, "source_not_allowed"),
]


async def test_bodies_that_are_none(small: World) -> None:
    for content_type, body, status, code in NO_BODIES:
        response = await small.admin.post(URL, content=body, headers={"content-type": content_type})
        assert (response.status_code, error_of(response)["code"]) == (status, code), (body, response.text)
    assert left_behind(small) == []


async def test_a_tenant_that_is_none(small: World) -> None:
    response = await small.upload(small.admin, "sql", 0, tenant="nobody")
    assert (response.status_code, error_of(response)["code"]) == (404, "tenant_not_found")
    assert error_of(response)["param"] == "tenant"


async def test_quotas_of_adapters_and_bytes(small: World) -> None:
    size = (await small.added(small.a, "one", 0))["bytes"]
    quotas = {"adapters": 2, "bytes": 2 * size + size // 2}
    await small.admin.patch("/admin/v1/tenants/a", json={"quotas": quotas})
    await small.added(small.a, "two", 1)
    over = await small.upload(small.a, "three", 0)
    assert (over.status_code, error_of(over)["code"]) == (429, "quota_adapters")
    assert over.headers["retry-after"].isdigit()
    assert error_of(over)["type"] == "rate_limit_error"
    large = await small.upload(small.a, "two", 2, replace=True)
    assert (large.status_code, error_of(large)["code"]) == (429, "quota_bytes")
    assert [each["name"] for each in (await small.a.get(URL)).json()["data"]] == ["one", "two"]
    counted = {
        sample.labels["kind"]: sample.value
        for family in small.harness.services.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "loramux_quota_rejections_total" and sample.labels["tenant"] == "a"
    }
    assert counted == {"adapters": 1.0, "bytes": 1.0}


class Sender:
    """A client on the ASGI interface itself, which sends what it is given, then says nothing until `leaving` is set."""

    def __init__(self, world: World, chunks: list[bytes], *, key: bytes = b"Bearer boss") -> None:
        self.sent: list[dict[str, Any]] = []
        self.leaving = asyncio.Event()
        self._chunks = chunks
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": URL,
            "raw_path": URL.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"multipart/form-data; boundary=x"), (b"authorization", key)],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.task = asyncio.create_task(world.harness.asgi(scope, self._receive, self._send))

    @property
    def status(self) -> int:
        return next(int(message["status"]) for message in self.sent if message["type"] == "http.response.start")

    async def _receive(self) -> dict[str, Any]:
        if self._chunks:
            return {"type": "http.request", "body": self._chunks.pop(0), "more_body": True}
        await self.leaving.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)


def half(world: World) -> list[bytes]:
    request = httpx.Request("POST", "http://x", data={"name": "sql"}, files=files_of(world.make(0)))
    body, boundary = request.read(), request.headers["content-type"].partition("boundary=")[2].encode()
    body = body.replace(boundary, b"x")
    return [body[:100], body[100 : len(body) * 2 // 3]]


async def test_a_client_that_leaves_in_the_middle(small: World) -> None:
    sender = Sender(small, half(small))
    sender.leaving.set()
    await sender.task
    assert sender.status == 499
    assert left_behind(small) == []
    assert small.harness.services.catalog.slots.taken == 0


async def test_a_client_that_says_nothing_more(make_world: Callable[..., Harness], tmp_path: Path) -> None:
    async with open_world(make_world({"timeout": 0.5}), tmp_path) as world:
        sender = Sender(world, half(world))
        await sender.task
        assert sender.status == 400
        assert left_behind(world) == []


async def test_only_so_many_uploads_at_once(small: World) -> None:
    keys = [client.headers["authorization"].encode() for client in (small.a, small.b)]
    slow = [Sender(small, half(small), key=key) for key in keys]
    slots = small.harness.services.catalog.slots
    while slots.taken < 2:
        await asyncio.sleep(0.001)
    waits = asyncio.create_task(small.upload(small.b, "sql", 0))
    await asyncio.sleep(0.05)
    assert (slots.taken, waits.done()) == (2, False)
    await small.added(small.admin, "mine", 0)  # the administrator's place is free
    assert not waits.done()
    for each in slow:
        each.leaving.set()
    await asyncio.gather(*[each.task for each in slow])
    assert (await waits).status_code == 201


async def test_one_tenant_does_not_take_all_places(small: World) -> None:
    slow = Sender(small, half(small), key=small.a.headers["authorization"].encode())
    while small.harness.services.catalog.slots.taken < 1:
        await asyncio.sleep(0.001)
    waits = asyncio.create_task(small.upload(small.a, "sql", 0))
    assert (await small.upload(small.b, "sql", 0)).status_code == 201
    assert not waits.done()
    slow.leaving.set()
    await slow.task
    assert slow.status == 499
    assert (await waits).status_code == 201


@pytest.mark.slow
async def test_two_hundred_uploads_of_one_name(small: World) -> None:
    answers = await asyncio.gather(*[small.upload(small.admin, "sql", index % 4) for index in range(200)])
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 199
    assert {error_of(answer)["code"] for answer in answers if answer.status_code == 409} == {"adapter_exists"}


async def test_what_costs_work_counts_as_a_request(small: World) -> None:
    await small.added(small.a, "sql", 0)
    await small.admin.patch("/admin/v1/tenants/a", json={"quotas": {"requests_per_second": 0.001}})
    assert (await small.a.post(f"{URL}/sql/prefetch")).status_code == 200
    merge = {"name": "new", "adapters": [{"name": "sql"}], "method": "cat"}
    for response in (
        await small.a.post(f"{URL}/sql/prefetch"),
        await small.a.post("/admin/v1/merges", json=merge),
        await small.upload(small.a, "new", 1),
    ):
        assert (response.status_code, error_of(response)["code"]) == (429, "quota_requests")
        assert int(response.headers["retry-after"]) > 1
    assert (await small.a.get(f"{URL}/sql")).status_code == 429
    assert (await small.admin.get(f"{URL}/sql?tenant=a")).status_code == 200
