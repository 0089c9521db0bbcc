"""/admin/v1/usage, /state, /drain, and what the documentation says."""

import asyncio
from typing import Any

import pytest
from fake_engine import FakeEngine
from transformers import PreTrainedTokenizerFast
from world import World, error_of

from adapters_store.registry import RegistryUnavailable
from server.engine.config import EngineStats

V1 = "/admin/v1"


async def test_usage(world: World) -> None:
    await world.added(world.admin, "sql", 0, public=True)
    for client, model in ((world.a, "sql"), (world.a, "sql"), (world.b, "tiny")):
        assert (await world.use(client, model)).status_code == 200
    page = (await world.admin.get(f"{V1}/usage")).json()
    counts = [(each["tenant"], each["adapter"], each["requests"], each["generation_tokens"]) for each in page["data"]]
    assert counts == [("a", "sql", 2, 6), ("b", "", 1, 3)]
    assert all(each["prompt_tokens"] > 0 for each in page["data"])
    assert set(page["data"][0]) == {"tenant", "adapter", "day", "requests", "prompt_tokens", "generation_tokens"}
    first = (await world.admin.get(f"{V1}/usage", params={"limit": 1})).json()
    rest = (await world.admin.get(f"{V1}/usage", params={"limit": 1, "cursor": first["next"]})).json()
    assert first["data"] + rest["data"] == page["data"]
    for_b = (await world.admin.get(f"{V1}/usage", params={"tenant": "b"})).json()["data"]
    assert for_b == (await world.b.get(f"{V1}/usage")).json()["data"] == page["data"][1:]
    day = page["data"][0]["day"]
    assert (await world.admin.get(f"{V1}/usage", params={"since": day, "until": day})).json() == page
    assert (await world.admin.get(f"{V1}/usage", params={"until": "2001-01-01"})).json()["data"] == []
    refused = await world.admin.get(f"{V1}/usage", params={"since": "2001-01-02", "until": "2001-01-01"})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "until")
    assert "expected a day not before since, 2001-01-02" in error["message"]


async def test_state(world: World) -> None:
    engine = world.harness.engine
    engine.stats = EngineStats(running=3, waiting=2, kv_blocks=64, kv_used_blocks=7, pages={"free": 5}, adapters_host=4)
    idle = (await world.admin.get(f"{V1}/state")).json()
    assert (idle["requests"], idle["oldest_waiting_seconds"], idle["draining"]) == (0, None, False)
    engine.gate.clear()
    running = asyncio.create_task(world.use(world.a, "tiny"))
    while not engine.num_waiting:
        await asyncio.sleep(0.001)
    state = (await world.admin.get(f"{V1}/state")).json()
    assert (state["requests"], state["running"], state["waiting"]) == (1, 3, 2)
    assert state["oldest_waiting_seconds"] >= 0
    assert state["oldest_running_seconds"] is None
    (shown,) = state["engines"]
    assert (shown["alive"], shown["kv_blocks"], shown["kv_used_blocks"]) == (True, 64, 7)
    assert (shown["pages"], shown["adapters"]) == ({"free": 5}, {"host": 4, "device": 0})
    engine.gate.set()
    await running
    engine.alive, engine.info = False, None
    assert (await world.admin.get(f"{V1}/state")).json()["engines"][0]["alive"] is False


async def test_state_of_several_engines(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = world.harness.engine, FakeEngine(tokenizer)
    first.others.append(second)
    first.stats = EngineStats(running=3, waiting=1, kv_blocks=64)
    second.stats, second.info, second.alive = EngineStats(waiting=2), None, False
    state = (await world.admin.get(f"{V1}/state")).json()
    assert (state["running"], state["waiting"]) == (3, 3)
    shown = [(each["id"], each["alive"], each["device"], each["kv_blocks"]) for each in state["engines"]]
    assert shown == [("0", True, "cpu", 64), ("1", False, None, 0)]


@pytest.mark.parametrize("body", [{"json": {"resume": True}}, {"content": b"x", "headers": {"Content-Type": "a/b"}}])
async def test_a_drain_that_asks_for_what_there_is_not(world: World, body: dict[str, Any]) -> None:
    refused = await world.admin.post(f"{V1}/drain", **body)
    assert refused.status_code in (400, 415)
    assert not world.harness.services.generator.is_draining
    for empty in ({"json": {}}, {"content": b"", "headers": {"Content-Type": "a/b"}}):
        assert (await world.admin.post(f"{V1}/drain", **empty)).status_code == 202


async def test_drain(world: World) -> None:
    engine = world.harness.engine
    engine.gate.clear()
    running = asyncio.create_task(world.use(world.a, "tiny"))
    while not engine.num_waiting:
        await asyncio.sleep(0.001)
    for _ in range(2):
        answer = await world.admin.post(f"{V1}/drain")
        assert (answer.status_code, answer.json()) == (202, {"running": 1})
    refused = await world.use(world.b, "tiny")
    assert (refused.status_code, error_of(refused)["code"]) == (503, "draining")
    assert refused.headers["retry-after"].isdigit()
    assert (await world.nobody.get("/ready")).status_code == 503
    assert (await world.admin.get(f"{V1}/state")).json()["draining"] is True
    engine.gate.set()
    assert (await running).status_code == 200
    assert (await world.admin.post(f"{V1}/drain")).json() == {"running": 0}


async def test_the_registry_is_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known keeps serving; what needs the registry says so in one sentence."""
    await world.added(world.admin, "sql", 0, public=True)
    assert (await world.use(world.a, "sql")).status_code == 200

    def away(*_: object, **__: object) -> None:
        raise RegistryUnavailable("its database does not answer")

    registry = world.harness.store.registry
    for name in ("get", "list", "register", "resolve", "update"):
        monkeypatch.setattr(registry, name, away)
    monkeypatch.setattr(registry.uses, "touch", away)
    monkeypatch.setattr(registry.removals, "mark", away)
    monkeypatch.setattr(registry.ledger, "add", away)
    assert (await world.use(world.a, "sql")).status_code == 200
    for method, path in (
        ("GET", f"{V1}/adapters"),
        ("GET", f"{V1}/adapters/sql"),
        ("PATCH", f"{V1}/adapters/sql"),
        ("DELETE", f"{V1}/adapters/sql"),
    ):
        response = await world.admin.request(method, path, json={})
        assert (response.status_code, error_of(response)["code"]) == (503, "registry_unavailable")
        assert response.headers["retry-after"].isdigit()
    upload = await world.upload(world.admin, "new", 1)
    assert upload.status_code == 503
    assert world.staged() == []
    monkeypatch.undo()
    assert (await world.admin.get(f"{V1}/adapters/sql?tenant=a")).json()["requests"] == 2


async def test_every_endpoint_is_documented(world: World) -> None:
    schema = (await world.nobody.get("/openapi.json")).json()
    operations = [
        (path, method, operation)
        for path, methods in schema["paths"].items()
        if path.startswith(V1) or path.endswith("load_lora_adapter")
        for method, operation in methods.items()
    ]
    assert len(operations) >= 20
    for path, method, operation in operations:
        assert operation["summary"], path
        assert len(operation["description"]) > 20, path
        assert operation["tags"], path
        assert "4XX" in operation["responses"], path
        assert "422" not in operation["responses"], path
        for parameter in operation.get("parameters", []):
            assert parameter["in"] in ("path", "query"), (path, method)
    register = schema["paths"][f"{V1}/adapters"]["post"]
    form = register["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"name", "config", "weights", "archive", "tags", "samples", "replace"} <= form["properties"].keys()
    assert form["properties"]["weights"]["format"] == "binary"
    assert "source" in register["requestBody"]["content"]["application/json"]["schema"]["required"]
    assert "modules_touched" in schema["components"]["schemas"]["NewAdapter"]["properties"]
