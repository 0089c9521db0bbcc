"""vLLM's endpoints for adapters."""

from pathlib import Path

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
        (LOAD, {"lora_name": "sql", "lora_path": f"{roots}/none"}, 422, None),
        (LOAD, {"lora_name": "sql", "lora_path": f"{roots}/../x"}, 422, None),
        (UNLOAD, {}, 400, "lora_name"),
        (UNLOAD, {"lora_name": 5}, 400, "lora_name"),
    ]
    world.make(0).rename(roots / "one")
    for path, body, status, param in cases:
        response = await world.admin.post(path, json=body)
        assert (response.status_code, error_of(response)["param"]) == (status, param), response.text
