"""Pinning adapters, and what becomes of a pin when its name moves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import Harness
from world import World, error_of, open_world

from adapters_store.leases import NOBODY
from adapters_store.registry import RegistryUnavailable
from server.engine.adapter_calls import EngineUnavailable

URL = "/admin/v1/adapters"


async def test_a_pin_and_its_end(world: World) -> None:
    """The fake engine has room for two."""
    engine = world.harness.engine
    digest = (await world.added(world.admin, "sql", 0))["digest"]
    pinned = await world.admin.patch(f"{URL}/sql", json={"pinned": True})
    assert (pinned.status_code, pinned.json()["pinned"], pinned.json()["residency"]) == (200, True, "device")
    assert pinned.json()["leases"] == 0
    assert set(engine.pinned) == {digest}
    assert Path(engine.pinned[digest]).is_dir()
    assert (await world.admin.patch(f"{URL}/sql", json={"pinned": False})).json()["pinned"] is False
    assert engine.pinned == {}
    assert world.harness.store.digest_leases(digest) == 0


async def test_pinned_from_the_start(world: World) -> None:
    answer = await world.added(world.admin, "sql", 0, pinned=True)
    assert answer["pinned"] is True
    path = Path(world.harness.engine.pinned[answer["digest"]])
    assert path.is_dir()
    assert "staging" not in path.parts


async def test_no_room(world: World) -> None:
    engine = world.harness.engine
    for number in range(2):
        await world.added(world.admin, f"n{number}", number, pinned=True)
    held = dict(engine.pinned)
    refused = await world.upload(world.admin, "n2", 2, pinned=True)
    assert (refused.status_code, error_of(refused)["code"]) == (409, "pins_exhausted")
    assert (await world.admin.get(f"{URL}/n2")).status_code == 404
    await world.added(world.admin, "n2", 2)
    refused = await world.admin.patch(f"{URL}/n2", json={"pinned": True, "tags": ["t"]})
    assert (refused.status_code, error_of(refused)["code"]) == (409, "pins_exhausted")
    shown = (await world.admin.get(f"{URL}/n2")).json()
    assert (shown["pinned"], shown["tags"]) == (False, [])
    assert engine.pinned == held
    await world.admin.delete(f"{URL}/n0")
    assert (await world.admin.patch(f"{URL}/n2", json={"pinned": True})).status_code == 200


async def test_one_digest_under_two_names(world: World) -> None:
    engine = world.harness.engine
    one = await world.added(world.admin, "one", 0, pinned=True)
    await world.added(world.admin, "two", 0, pinned=True)
    await world.admin.patch(f"{URL}/one", json={"pinned": False})
    assert set(engine.pinned) == {one["digest"]}
    await world.admin.delete(f"{URL}/two")
    assert engine.pinned == {}


async def test_a_pin_follows_its_name(world: World) -> None:
    engine = world.harness.engine
    first = await world.added(world.admin, "sql", 0, pinned=True)
    second = await world.added(world.admin, "sql", 1, replace=True)
    assert second["pinned"] is True
    assert set(engine.pinned) == {second["digest"]}
    await world.admin.patch(f"{URL}/sql", json={"digest": first["digest"]})
    assert set(engine.pinned) == {first["digest"]}
    await world.added(world.admin, "other", 2, pinned=True)
    # Both revisions at once have no room; one after the other has.
    moved = await world.admin.patch(f"{URL}/sql", json={"digest": second["digest"]})
    assert moved.status_code == 200
    assert second["digest"] in engine.pinned
    assert len(engine.pinned) == 2


async def test_a_tenants_replacement_does_not_inherit_a_pin(world: World) -> None:
    engine = world.harness.engine
    first = await world.added(world.a, "mine", 0)
    assert (await world.admin.patch(f"{URL}/mine?tenant=a", json={"pinned": True})).status_code == 200
    assert (await world.a.patch(f"{URL}/mine", json={"tags": ["t"]})).json()["pinned"] is True
    assert set(engine.pinned) == {first["digest"]}
    second = await world.added(world.a, "mine", 1, replace=True)
    assert (second["pinned"], len(second["warnings"])) == (False, 1)
    assert engine.pinned == {}
    await world.admin.patch(f"{URL}/mine?tenant=a", json={"pinned": True})
    back = await world.a.patch(f"{URL}/mine", json={"digest": first["digest"]})
    assert (back.status_code, back.json()["pinned"]) == (200, False)
    assert engine.pinned == {}


async def test_a_deletion_that_is_refused_keeps_the_pin(world: World) -> None:
    engine, store = world.harness.engine, world.harness.store
    digest = (await world.added(world.admin, "sql", 0, pinned=True))["digest"]
    resolved = await store.resolve("default", ["sql"])
    lease = await store.lease("default", tuple(resolved.values()))
    refused = await world.admin.delete(f"{URL}/sql?wait=false")
    assert refused.status_code == 409
    assert set(engine.pinned) == {digest}
    store.release(lease)
    assert (await world.admin.delete(f"{URL}/sql?wait=false")).status_code == 200
    assert engine.pinned == {}


async def test_pins_are_set_again_at_start(make_world: Callable[..., Harness], tmp_path: Path) -> None:
    harness = make_world()
    async with open_world(harness, tmp_path) as world:
        digest = (await world.added(world.admin, "sql", 0, pinned=True))["digest"]
        await world.added(world.admin, "free", 1)
    await harness.services.catalog.close()
    again = make_world()
    assert again.engine.pinned == {}
    await again.services.catalog.start()
    assert set(again.engine.pinned) == {digest}
    assert again.store.leases(NOBODY, "default", "sql") == 1


async def test_a_broken_adapter_is_not_pinned(world: World) -> None:
    folder = world.make(0)
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    response = await world.upload(world.admin, "sql", folder, pinned=True)
    assert (response.status_code, error_of(response)["code"]) == (422, "adapter_corrupt")
    assert world.harness.engine.pinned == {}


async def test_a_taken_name_is_not_pinned(world: World) -> None:
    await world.added(world.admin, "sql", 0)
    assert (await world.upload(world.admin, "sql", 1, pinned=True)).status_code == 409
    assert world.harness.engine.pinned == {}


async def test_a_pin_that_the_engine_lost_is_in_nobodys_way(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """A pinned name can be changed, replaced and unpinned while there is no room, or no engine, for its pin."""
    engine, pins = world.harness.engine, world.harness.services.catalog.pins
    first = await world.added(world.admin, "sql", 0, pinned=True)
    await pins.unpin("default", "sql")
    engine.most_pins = 0
    assert (await world.admin.patch(f"{URL}/sql", json={"tags": ["t"]})).status_code == 200
    moved = await world.added(world.admin, "sql", 1, replace=True)
    assert (moved["pinned"], len(moved["warnings"])) == (False, 1)
    assert "not pinned: no room" in caplog.text
    refused = await world.admin.patch(f"{URL}/sql", json={"pinned": True, "digest": first["digest"]})
    assert refused.status_code == 409
    assert (await world.admin.get(f"{URL}/sql")).json()["digest"] == moved["digest"]

    async def gone(*_: object) -> bool:
        raise EngineUnavailable("no engine at ipc:///tmp/secret")

    engine.pin = gone
    for response in (
        await world.admin.patch(f"{URL}/sql", json={"pinned": True}),
        await world.upload(world.admin, "new", 2, pinned=True),
    ):
        assert (response.status_code, error_of(response)["code"]) == (503, "engine_unavailable")
    assert (await world.admin.get(f"{URL}/new")).status_code == 404


async def test_a_change_that_fails_changes_no_pin(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, store = world.harness.engine, world.harness.store
    first = await world.added(world.admin, "sql", 0, pinned=True)
    second = await world.added(world.admin, "sql", 1, replace=True)

    def away(*_: object, **__: object) -> None:
        raise RegistryUnavailable("its database does not answer")

    for name in ("update", "roll_back"):
        monkeypatch.setattr(store.registry, name, away)
    monkeypatch.setattr(store.registry.removals, "mark", away)
    for change in ({"pinned": False}, {"digest": first["digest"]}):
        assert (await world.admin.patch(f"{URL}/sql", json=change)).status_code == 503
        assert set(engine.pinned) == {second["digest"]}
    assert (await world.admin.delete(f"{URL}/sql")).status_code == 503
    assert set(engine.pinned) == {second["digest"]}
    monkeypatch.undo()
    assert (await world.admin.delete(f"{URL}/sql")).status_code == 200
    assert engine.pinned == {}


async def test_deleted_while_it_is_pinned(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pin is set when the name is already gone: nothing keeps it."""
    engine, store = world.harness.engine, world.harness.store
    await world.added(world.admin, "sql", 0)
    update = store.names.update

    async def delete_first(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(store.names, "update", update)
        assert (await world.admin.delete(f"{URL}/sql")).status_code == 200
        return await update(*args, **options)

    monkeypatch.setattr(store.names, "update", delete_first)
    response = await world.admin.patch(f"{URL}/sql", json={"pinned": True})
    assert (response.status_code, error_of(response)["code"]) == (404, "adapter_not_found")
    assert engine.pinned == {}
    await world.added(world.admin, "sql", 0)
