"""What a tenant can learn of another's private adapters, over every endpoint: nothing.

Answers about a private adapter of `a` are, for everybody else, those about a name that never existed, byte by byte.
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from world import World

SECRET, ABSENT = "secret", "absent"
V1 = "/admin/v1"
Ask = tuple[str, str, dict[str, Any] | None]


@pytest.fixture
def world(routed: World) -> World:
    return routed


@pytest.fixture
async def told(world: World) -> dict[str, Any]:
    """`a` has a private adapter, which it has used and which is on the device, and used up some of everything."""
    fields = {"tags": ["hush"], "samples": ["psst"], "description": "d"}
    secret = await world.added(world.a, SECRET, 0, **fields)
    await world.added(world.a, SECRET, 1, replace=True)
    await world.a.patch(f"{V1}/adapters/{SECRET}", json={"digest": secret["digest"]})
    assert (await world.use(world.a, SECRET)).status_code == 200
    shown = (await world.a.post(f"{V1}/adapters/{SECRET}/prefetch")).json()
    assert (shown["residency"], shown["requests"]) == ("device", 1)
    await world.added(world.admin, "public", 5, public=True)
    return secret


def asks(name: str, digest: str) -> list[Ask]:
    """Every call that takes the name of an adapter, under every form of it."""
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    text = {"prompt": "Hi", "max_tokens": 2}
    found: list[Ask] = [
        ("GET", f"{V1}/adapters/{name}", None),
        ("PATCH", f"{V1}/adapters/{name}", {}),
        ("PATCH", f"{V1}/adapters/{name}", {"tags": ["x"]}),
        ("PATCH", f"{V1}/adapters/{name}", {"digest": digest}),
        ("PATCH", f"{V1}/adapters/{name}", {"digest": digest[:8]}),
        ("DELETE", f"{V1}/adapters/{name}", None),
        ("DELETE", f"{V1}/adapters/{name}?wait=true", None),
        ("DELETE", f"{V1}/adapters/{name}?wait=false", None),
        ("POST", f"{V1}/adapters/{name}/prefetch", None),
        ("POST", f"{V1}/tenants/a/keys", None),
        ("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": "/x"}),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": name}),
        ("GET", f"{V1}/usage?tenant=a", None),
        ("GET", f"{V1}/adapters?tag=hush", None),
        ("GET", f"{V1}/adapters?residency=device", None),
    ]
    for model in (name, f"{name}@{digest[:8]}", f"{name}@{digest}"):
        found += [
            ("GET", f"/v1/models/{model}", None),
            ("POST", "/v1/completions", text | {"model": model}),
            ("POST", "/v1/completions", text | {"model": "tiny", "adapter_id": model}),
            ("POST", "/v1/completions", text | {"model": model, "stream": True}),
            ("POST", "/v1/chat/completions", chat | {"model": model}),
            ("POST", "/v1/chat/completions", chat | {"model": "tiny", "lora": {"adapters": [{"name": model}]}}),
            (
                "POST",
                "/v1/completions",
                text | {"model": "tiny", "lora": {"adapters": [{"name": "public"}, {"name": model, "weight": 0.0}]}},
            ),
            ("POST", "/v1/completions", text | {"model": "auto", "lora": {"candidates": [model]}}),
            ("POST", f"{V1}/route", {"prompt": "Hi", "candidates": [model]}),
            ("POST", "/v1/embeddings", {"model": model, "input": "Hi"}),
            ("POST", "/tokenize", {"model": model, "prompt": "Hi"}),
            ("POST", "/detokenize", {"model": model, "tokens": [5]}),
            ("POST", f"{V1}/merges", {"name": "new", "method": "cat", "adapters": [{"name": model}]}),
            (
                "POST",
                f"{V1}/merges",
                {"name": "new", "method": "linear", "adapters": [{"name": "public"}, {"name": model}]},
            ),
        ]
    return found


async def answer(client: httpx.AsyncClient, ask: Ask) -> tuple[int, bytes, dict[str, str]]:
    method, path, body = ask
    response = await client.request(method, path, json=body)
    changing = {"x-request-id", "date", "x-loramux-route"}
    headers = {key: value for key, value in response.headers.items() if key not in changing}
    return response.status_code, response.content, headers


async def test_no_call_tells_a_private_adapter_from_none(world: World, told: dict[str, Any]) -> None:
    digest = told["digest"]
    for client in (world.b, world.member):
        for ask, about_none in zip(asks(SECRET, digest), asks(ABSENT, digest), strict=True):
            status, body, headers = await answer(client, ask)
            expected_status, expected_body, expected_headers = await answer(client, about_none)
            assert status == expected_status, ask
            assert body.replace(SECRET.encode(), ABSENT.encode()) == expected_body, ask
            assert headers == expected_headers, ask
            assert digest.encode() not in body or digest in json.dumps(ask), ask
            assert status != 200 or "?" in ask[1], ask
    engine = world.harness.engine
    assert [request.tenant for request in engine.requests] == ["a"]
    shown = (await world.a.get(f"{V1}/adapters/{SECRET}")).json()
    assert (shown["digest"], shown["tags"], shown["requests"]) == (digest, ["hush"], 1)


async def test_no_list_shows_or_counts_it(world: World, told: dict[str, Any]) -> None:
    for client in (world.b, world.member, world.admin):
        for path in ("/v1/models", f"{V1}/adapters", f"{V1}/adapters?limit=1"):
            body = (await client.get(path)).text
            assert SECRET not in body
            assert told["digest"] not in body
    assert (await world.b.get(f"{V1}/usage")).json() == {"data": [], "next": None}
    mine = (await world.a.get(f"{V1}/usage")).json()["data"]
    assert [(line["tenant"], line["adapter"], line["requests"]) for line in mine] == [("a", SECRET, 1)]


async def test_other_tenants_and_none_are_the_same(world: World, told: dict[str, Any]) -> None:
    assert told
    for path in (f"{V1}/adapters", f"{V1}/adapters/{SECRET}", f"{V1}/usage"):
        there = await world.b.get(path, params={"tenant": "a"})
        nowhere = await world.b.get(path, params={"tenant": "z"})
        assert (there.status_code, there.content) == (nowhere.status_code, nowhere.content)
        assert there.status_code == 403
    for tenant in ("a", "z"):
        assert (await world.upload(world.b, "new", 1, tenant=tenant)).status_code == 403


async def test_the_same_name_is_free(world: World, told: dict[str, Any]) -> None:
    """Each tenant has its own under it, and neither replaces, deletes nor uses the other's."""
    mine = await world.added(world.b, SECRET, 7)
    assert mine["revisions"] == [{"digest": mine["digest"], "created": 1000.0}]
    assert (mine["tags"], mine["description"]) == ([], "")

    async def used(client: httpx.AsyncClient) -> str:
        return str((await world.use(client, SECRET)).json()["lora"]["adapters"][0]["digest"])

    assert await used(world.b) == mine["digest"]
    assert await used(world.a) == told["digest"]
    assert (await world.b.patch(f"{V1}/adapters/{SECRET}", json={"digest": told["digest"]})).status_code == 404
    assert (await world.b.get(f"/v1/models/{SECRET}@{told['digest'][:8]}")).status_code == 404
    assert (await world.b.delete(f"{V1}/adapters/{SECRET}")).status_code == 200
    assert (await world.use(world.b, SECRET)).status_code == 404
    assert await used(world.a) == told["digest"]


async def test_the_same_weights_tell_nothing(world: World, told: dict[str, Any]) -> None:
    """They are stored once and share the device's memory; what is shown is each tenant's own."""
    engine, digest = world.harness.engine, told["digest"]
    copy = await world.added(world.b, "copy", 0)
    fresh = await world.added(world.b, "fresh", 9)
    assert copy["digest"] == digest
    names = ("name", "digest", "revisions")
    assert {key: value for key, value in copy.items() if key not in names} == {
        key: value for key, value in fresh.items() if key not in names
    }
    assert (copy["residency"], copy["leases"], copy["requests"], copy["last_used"]) == ("disk", 0, 0, None)
    listed = (await world.b.get(f"{V1}/adapters?residency=device")).json()
    assert listed["data"] == []
    # While `a` uses it, too.
    engine.gate.clear()
    running = asyncio.create_task(world.use(world.a, SECRET))
    while not engine.num_waiting:
        await asyncio.sleep(0.001)
    shown = (await world.b.get(f"{V1}/adapters/copy")).json()
    assert (shown["residency"], shown["leases"], shown["requests"]) == ("disk", 0, 0)
    assert (await world.a.get(f"{V1}/adapters/{SECRET}")).json()["leases"] == 1
    # And what `a` uses does not delay the end of the copy.
    deleted = await world.b.delete(f"{V1}/adapters/copy")
    assert (deleted.status_code, deleted.json()["status"]) == (200, "gone")
    assert engine.evicted == []
    engine.gate.set()
    assert (await running).status_code == 200
    # A use of one's own is told.
    await world.added(world.b, "copy", 0)
    await world.use(world.b, "copy")
    assert (await world.b.get(f"{V1}/adapters/copy")).json()["residency"] == "device"


async def test_one_tenants_prefixes_are_not_anothers(world: World, told: dict[str, Any]) -> None:
    """Equal weights, equal prompts: the roots of the prefix cache differ all the same."""
    await world.added(world.b, "copy", 0)
    await world.use(world.a, SECRET)
    await world.use(world.b, "copy")
    await world.use(world.a, "tiny")
    await world.use(world.b, "tiny")
    keys = {(request.tenant, request.mix): request.cache_key for request in world.harness.engine.requests}
    assert len(keys) == 4
    assert len(set(keys.values())) == 4
    assert told


async def test_quotas_count_ones_own(world: World, told: dict[str, Any]) -> None:
    await world.admin.patch(f"{V1}/tenants/b", json={"quotas": {"adapters": 1, "bytes": told["bytes"]}})
    await world.added(world.b, "copy", 0)
    assert (await world.upload(world.b, "more", 3)).status_code == 429
    assert (await world.upload(world.a, "more", 3)).status_code == 201


async def test_a_merge_of_private_adapters_keeps_its_recipe(world: World, told: dict[str, Any]) -> None:
    body = {"name": "mixed", "method": "cat", "adapters": [{"name": SECRET}, {"name": "public"}]}
    merged = await world.a.post(f"{V1}/merges", json=body)
    assert merged.status_code == 201, merged.text
    assert [entry["name"] for entry in merged.json()["recipe"]["adapters"]] == [SECRET, "public"]
    patch = {"public": True, "description": "for all"}
    assert (await world.admin.patch(f"{V1}/adapters/mixed?tenant=a", json=patch)).status_code == 200
    shown = (await world.b.get(f"{V1}/adapters/mixed")).text
    assert json.loads(shown)["recipe"] is None
    assert SECRET not in shown
    assert told["digest"] not in shown


def test_every_endpoint_is_covered(world_paths: Sequence[tuple[str, str]]) -> None:
    """An endpoint that takes an adapter's name and is new belongs into `asks`."""
    asked = {(method, path.partition("?")[0]) for method, path, _ in asks("{name}", "0" * 64)}
    asked = {(method, path.replace("/v1/models/{name}", "/v1/models/{model}")) for method, path in asked}
    elsewhere = {
        ("GET", f"{V1}/adapters"),
        ("POST", f"{V1}/adapters"),
        ("GET", f"{V1}/usage"),
        ("GET", "/v1/models"),
    }
    reserved = tuple(f"{V1}/{what}" for what in ("tenants", "state", "drain", "routers"))
    admins = {path for _, path in world_paths if path.startswith(reserved)}
    operators = {"/health", "/health/decode", "/ready", "/version", "/metrics"}
    left = {
        (method, path)
        for method, path in world_paths
        if (method, path) not in asked | elsewhere and path not in admins | operators
    }
    assert left == set()
