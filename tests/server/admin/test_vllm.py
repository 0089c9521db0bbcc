"""vLLM's endpoints for adapters."""

import asyncio
from pathlib import Path

import pytest
from world import World, error_of

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


async def test_load_use_and_unload(world: World, roots: Path) -> None:
    world.make(0).rename(roots / "one")
    world.make(1).rename(roots / "two words")
    loaded = await world.admin.post(LOAD, json={"lora_name": "sql", "lora_path": f"{roots}/one"})
    assert loaded.status_code == 200, loaded.text
    assert loaded.headers["content-type"].startswith("text/plain")
    assert loaded.text == "Success: LoRA adapter 'sql' added successfully."
    assert (await world.use(world.b, "sql")).status_code == 200
    again = {"lora_name": "sql", "lora_path": f"{roots}/two words"}
    taken = await world.admin.post(LOAD, json=again)
    assert (taken.status_code, error_of(taken)["param"]) == (400, "lora_name")
    replaced = await world.admin.post(LOAD, json=again | {"load_inplace": True, "is_3d_lora_weight": False})
    assert replaced.status_code == 200
    shown = (await world.admin.get("/admin/v1/adapters/sql")).json()
    assert (shown["public"], len(shown["revisions"])) == (True, 2)
    unloaded = await world.admin.post(UNLOAD, json={"lora_name": "sql", "lora_int_id": 1})
    assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
    assert (await world.use(world.b, "sql")).status_code == 404
    unknown = await world.admin.post(UNLOAD, json={"lora_name": "sql"})
    assert (unknown.status_code, error_of(unknown)["code"]) == (404, "adapter_not_found")


async def test_refusals(world: World, roots: Path) -> None:
    cases: list[tuple[str, dict[str, object], int, str | None]] = [
        (LOAD, {}, 400, "lora_name"),
        (LOAD, {"lora_name": "", "lora_path": "/x"}, 400, "lora_name"),
        (LOAD, {"lora_name": "sql"}, 400, "lora_path"),
        (LOAD, {"lora_name": "sql", "lora_path": "sub/folder/x"}, 400, "lora_path"),
        (LOAD, {"lora_name": "sql", "lora_path": "/etc"}, 403, "lora_path"),
        (LOAD, {"lora_name": "auto", "lora_path": f"{roots}/one"}, 400, "lora_name"),
        (LOAD, {"lora_name": "sql", "lora_path": f"{roots}/none"}, 400, "lora_path"),
        (LOAD, {"lora_name": "sql", "lora_path": f"{roots}/../x"}, 422, None),
        (UNLOAD, {}, 400, "lora_name"),
        (UNLOAD, {"lora_name": 5}, 400, "lora_name"),
    ]
    world.make(0).rename(roots / "one")
    for path, body, status, param in cases:
        response = await world.admin.post(path, json=body)
        assert (response.status_code, error_of(response)["param"]) == (status, param), response.text


@pytest.mark.parametrize("inplace", [True, False])
async def test_loading_again_what_requests_still_use(world: World, roots: Path, inplace: bool) -> None:
    engine = world.harness.engine
    world.make(0).rename(roots / "one")
    body = {"lora_name": "sql", "lora_path": f"{roots}/one"}
    assert (await world.admin.post(LOAD, json=body)).status_code == 200
    engine.gate.clear()
    using = asyncio.create_task(world.use(world.b, "sql"))
    while not engine.num_waiting:
        await asyncio.sleep(0.001)
    assert (await world.admin.post(UNLOAD, json={"lora_name": "sql"})).status_code == 200
    refused = await world.admin.post(LOAD, json=body | {"load_inplace": inplace})
    assert (refused.status_code, error_of(refused)["code"]) == (409, "adapter_deleting")
    assert error_of(refused)["param"] == "lora_name"
    assert "is being deleted" in error_of(refused)["message"]
    assert refused.headers["retry-after"].isdigit()
    waiting = asyncio.create_task(world.admin.delete("/admin/v1/adapters/sql?wait=true"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    engine.gate.set()
    assert (await using).status_code == 200
    assert ((await waiting).status_code, (await waiting).json()["status"]) == (200, "gone")
    assert (await world.admin.post(LOAD, json=body | {"load_inplace": inplace})).status_code == 200
