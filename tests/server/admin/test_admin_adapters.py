"""/admin/v1/adapters: from upload to deletion."""

import asyncio
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
from world import CONFIG, WEIGHTS, World, error_of, files_of, form

from server.engine.client import EngineUnavailable

SHAPE = {
    "name",
    "digest",
    "tenant",
    "public",
    "rank",
    "alpha",
    "targets",
    "modules",
    "bytes",
    "tags",
    "description",
    "pinned",
    "residency",
    "leases",
    "requests",
    "created",
    "last_used",
    "revisions",
    "recipe",
}


async def test_an_upload_is_usable_in_the_next_request(world: World) -> None:
    fields = {"tags": ["x", "y"], "samples": ["How?"], "description": "Writes SQL", "public": True}
    answer = await world.added(world.admin, "sql", **fields)
    assert set(answer) == SHAPE | {"modules_touched", "warnings"}
    assert answer["name"] == "sql"
    assert (answer["tenant"], answer["public"], answer["pinned"]) == ("default", True, False)
    assert (answer["rank"], answer["alpha"], answer["modules"]) == (2, 4.0, 1)
    assert answer["targets"] == ["q_proj"]
    assert answer["modules_touched"] == ["layers.0.self_attn.q_proj"]
    assert answer["warnings"] == []
    stored = (world.folder / "blobs" / "sha256").iterdir()
    assert answer["bytes"] == sum(blob.stat().st_size for blob in stored)
    assert answer["tags"] == ["x", "y"]
    assert answer["description"] == "Writes SQL"
    assert answer["revisions"] == [{"digest": answer["digest"], "created": 1000.0}]
    used = await world.use(world.a, "sql")
    assert used.status_code == 200
    assert used.json()["lora"]["adapters"][0]["digest"] == answer["digest"]
    assert world.staged() == []


@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
async def test_archives(world: World, suffix: str) -> None:
    folder, archive = world.make(1), io.BytesIO()
    if suffix == "zip":
        with zipfile.ZipFile(archive, "w") as out:
            for name in (CONFIG, WEIGHTS):
                out.write(folder / name, f"sql/{name}")
    else:
        with tarfile.open(fileobj=archive, mode="w:gz") as out:
            for name in (CONFIG, WEIGHTS):
                out.add(folder / name, name)
    response = await world.admin.post(
        "/admin/v1/adapters", data={"name": "sql"}, files={"archive": ("any", archive.getvalue())}
    )
    assert response.status_code == 201, response.text
    assert response.json()["digest"] == (await world.added(world.admin, "again", 1))["digest"]


async def test_a_source_under_a_root(world: World, roots: Path) -> None:
    world.make(3).rename(roots / "sql")
    body = {"name": "sql", "source": f"file://{roots}/sql", "tags": ["t"]}
    response = await world.admin.post("/admin/v1/adapters", json=body)
    assert response.status_code == 201, response.text
    assert response.json()["tags"] == ["t"]
    assert (await world.use(world.admin, "sql")).status_code == 200


async def test_a_differing_base_is_a_warning_of_whoever_uploads_it(world: World) -> None:
    folder = world.make(0)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "org/secret-base"}))
    (warning,) = (await world.added(world.a, "first", folder))["warnings"]
    assert "secret-base" in warning
    (folder / CONFIG).write_text(json.dumps(config))
    assert (await world.added(world.b, "second", folder))["warnings"] == []


async def test_a_name_is_taken_or_replaced(world: World) -> None:
    first = await world.added(world.admin, "sql", 0, tags=["old"], description="d")
    response = await world.upload(world.admin, "sql", 1)
    assert response.status_code == 409
    assert error_of(response)["code"] == "adapter_exists"
    assert error_of(response)["param"] == "name"
    second = await world.added(world.admin, "sql", 1, replace=True)
    assert [each["digest"] for each in second["revisions"]] == [first["digest"], second["digest"]]
    assert (second["tags"], second["description"]) == (["old"], "d")
    used = await world.use(world.admin, "sql")
    assert used.json()["lora"]["adapters"][0]["digest"] == second["digest"]
    pinned = await world.use(world.admin, f"sql@{first['digest'][:8]}")
    assert pinned.json()["lora"]["adapters"][0]["digest"] == first["digest"]


async def test_one_of_many_wins_a_name(world: World) -> None:
    world.make(0)
    responses = await asyncio.gather(*[world.upload(world.admin, "sql", 0) for _ in range(4)])
    assert sorted(each.status_code for each in responses) == [201, 409, 409, 409]


async def test_lists_come_in_parts(world: World) -> None:
    for number in range(5):
        await world.added(world.admin, f"n{number}", number, tags=["even"] if number % 2 == 0 else [])
    names, cursor = [], None
    for _ in range(3):
        query = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = (await world.admin.get("/admin/v1/adapters", params=query)).json()
        assert len(page["data"]) <= 2
        assert all(set(each) == SHAPE for each in page["data"])
        names += [each["name"] for each in page["data"]]
        cursor = page["next"]
    assert (names, cursor) == ([f"n{number}" for number in range(5)], None)
    even = (await world.admin.get("/admin/v1/adapters", params={"tag": "even"})).json()
    assert [each["name"] for each in even["data"]] == ["n0", "n2", "n4"]


async def test_lists_by_residency(world: World) -> None:
    for number in range(5):
        await world.added(world.admin, f"n{number}", number)
    for name in ("n1", "n3", "n4"):
        response = await world.admin.post(f"/admin/v1/adapters/{name}/prefetch")
        assert (response.status_code, response.json()["residency"]) == (200, "device")

    async def names(**query: object) -> tuple[list[str], str | None]:
        page = (await world.admin.get("/admin/v1/adapters", params=query)).json()
        return [each["name"] for each in page["data"]], page["next"]

    assert await names(residency="disk") == (["n0", "n2"], None)
    assert await names(residency="device", limit=2) == (["n1", "n3"], "n3")
    assert await names(residency="device", limit=2, cursor="n3") == (["n4"], None)
    assert await names(residency="host") == ([], None)


async def test_changes(world: World) -> None:
    first = await world.added(world.admin, "sql", 0)
    second = await world.added(world.admin, "sql", 1, replace=True)
    changes = {"tags": ["b", "a"], "description": "new", "samples": ["one"], "public": True}
    response = await world.admin.patch("/admin/v1/adapters/sql", json=changes)
    assert response.status_code == 200, response.text
    assert response.json()["tags"] == ["a", "b"]
    assert (response.json()["description"], response.json()["public"]) == ("new", True)
    assert response.json()["digest"] == second["digest"]
    back = await world.admin.patch("/admin/v1/adapters/sql", json={"digest": first["digest"]})
    assert back.json()["digest"] == first["digest"]
    used = await world.use(world.admin, "sql")
    assert used.json()["lora"]["adapters"][0]["digest"] == first["digest"]
    forth = await world.admin.patch("/admin/v1/adapters/sql", json={"digest": second["digest"][:6]})
    assert forth.json()["digest"] == second["digest"]
    same = await world.admin.patch("/admin/v1/adapters/sql", json={})
    assert same.json() == forth.json() == (await world.admin.get("/admin/v1/adapters/sql")).json()
    unknown = await world.admin.patch("/admin/v1/adapters/sql", json={"digest": "ab" * 32, "tags": ["no"]})
    assert (unknown.status_code, error_of(unknown)["code"]) == (404, "revision_not_found")
    assert (await world.admin.get("/admin/v1/adapters/sql")).json() == same.json()


async def test_deletion(world: World) -> None:
    digest = (await world.added(world.admin, "sql"))["digest"]
    response = await world.admin.delete("/admin/v1/adapters/sql")
    assert (response.status_code, response.json()) == (200, {"name": "sql", "status": "gone"})
    assert world.harness.engine.evicted == [digest]
    for path in ("/admin/v1/adapters/sql", "/v1/models/sql"):
        assert (await world.admin.get(path)).status_code == 404
    assert (await world.use(world.admin, "sql")).status_code == 404
    assert (await world.admin.delete("/admin/v1/adapters/sql")).status_code == 404
    await world.added(world.admin, "sql", 1)


async def test_deletion_while_in_use(world: World) -> None:
    await world.added(world.admin, "sql")
    engine = world.harness.engine
    engine.gate.clear()
    running = asyncio.create_task(world.use(world.admin, "sql"))
    while not engine.num_waiting:
        await asyncio.sleep(0.001)
    shown = (await world.admin.get("/admin/v1/adapters/sql")).json()
    assert shown["leases"] == 1
    refused = await world.admin.delete("/admin/v1/adapters/sql", params={"wait": "false"})
    assert (refused.status_code, error_of(refused)["code"]) == (409, "adapter_in_use")
    assert (await world.admin.get("/admin/v1/adapters/sql")).status_code == 200
    draining = await world.admin.delete("/admin/v1/adapters/sql")
    assert (draining.status_code, draining.json()["status"]) == (202, "draining")
    assert (await world.use(world.admin, "sql")).status_code == 404
    taken = await world.upload(world.admin, "sql", 1)
    assert taken.status_code == 409
    assert engine.evicted == []
    engine.gate.set()
    assert (await running).status_code == 200
    while not engine.evicted:
        await asyncio.sleep(0.001)
    await world.added(world.admin, "sql", 1)


async def test_deletion_that_waits(world: World) -> None:
    await world.added(world.admin, "sql")
    engine = world.harness.engine
    engine.gate.clear()
    running = asyncio.create_task(world.use(world.admin, "sql"))
    while not engine.num_waiting:
        await asyncio.sleep(0.001)
    deleting = asyncio.create_task(world.admin.delete("/admin/v1/adapters/sql", params={"wait": "true"}))
    while (await world.admin.get("/admin/v1/adapters/sql")).status_code != 404:
        await asyncio.sleep(0.001)
    assert not deleting.done()
    engine.gate.set()
    assert (await running).status_code == 200
    assert ((await deleting).status_code, (await deleting).json()["status"]) == (200, "gone")


async def test_counters_are_those_of_the_tenant(world: World) -> None:
    await world.added(world.admin, "sql", public=True)
    for _ in range(2):
        await world.use(world.a, "sql")
    shown = (await world.a.get("/admin/v1/adapters/sql")).json()
    assert shown["requests"] == 2
    assert shown["last_used"] is not None
    assert (await world.b.get("/admin/v1/adapters/sql")).json()["requests"] == 0
    assert (await world.admin.get("/admin/v1/adapters/sql?tenant=a")).json()["requests"] == 2


async def test_an_engine_that_is_gone(world: World) -> None:
    await world.added(world.admin, "sql")

    async def gone(*_: object) -> str:
        raise EngineUnavailable("no engine at ipc:///tmp/secret")

    world.harness.engine.prefetch_now = gone
    response = await world.admin.post("/admin/v1/adapters/sql/prefetch")
    assert (response.status_code, error_of(response)["code"]) == (503, "engine_unavailable")
    assert response.headers["retry-after"].isdigit()


async def test_form_fields_are_checked(world: World) -> None:
    world.make(0)
    for fields, param in (
        ({"name": "sql", "nam": "x"}, "nam"),
        ({"name": "sql", "source": "file:///x"}, "source"),
        ({"name": "sql", "tags": "a,b"}, "tags"),
        ({"name": "sql", "tags": "[1]"}, "tags.0"),
        ({"name": "sql", "samples": '"one"'}, "samples"),
        ({"name": "sql", "samples": '["one", "\\ud800"]'}, "samples.1"),
        ({"name": "sql", "tags": '["\\udfff"]'}, "tags.0"),
        ({"name": "sql", "public": "yes"}, "public"),
        ({"name": "sql", "replace": "1"}, "replace"),
        ({}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "auto"}, "name"),
        ({"name": "tiny"}, "name"),
        ({"name": ""}, "name"),
    ):
        response = await world.admin.post("/admin/v1/adapters", data=form(**fields), files=files_of(world.make(0)))
        assert response.status_code == 400, (fields, response.text)
        assert error_of(response)["param"] == param, response.text
    assert (await world.admin.get("/admin/v1/adapters")).json()["data"] == []
    assert world.staged() == []
