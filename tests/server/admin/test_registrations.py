"""Registrations: what is said of them, and what happens to their names meanwhile."""

from dataclasses import replace
from typing import Any
from urllib.parse import quote

import pytest
from world import World, error_of

from adapters_store.registry import Resolved
from adapters_store.source_policy import source_unavailable
from server.tenants import Caller

URL = "/admin/v1/adapters"


@pytest.mark.parametrize(("field", "value"), [("description", "a\0b"), ("tags", ["a", "a\0b"]), ("samples", ["\0"])])
async def test_text_that_no_database_takes(world: World, field: str, value: object) -> None:
    await world.added(world.admin, "sql", 0)
    param = field if isinstance(value, str) else f"{field}.{len(value) - 1}"  # type: ignore[arg-type]
    for response in (
        await world.admin.patch(f"{URL}/sql", json={field: value}),
        await world.upload(world.admin, "new", 1, **{field: value}),
    ):
        assert (response.status_code, error_of(response)["param"]) == (400, param)


async def test_what_no_pool_can_hold_is_registered_with_a_warning(world: World) -> None:
    info = world.harness.engine.info
    assert info is not None
    world.harness.engine.info = replace(info, num_pages={"qkv": 0})
    (warning,) = (await world.added(world.admin, "sql", 0))["warnings"]
    assert warning.startswith("requests for it are refused here with mix_too_large: it needs 1 rank pages of qkv")
    assert (await world.added(world.admin, "sql", 0, replace=True))["warnings"] == [warning]
    world.harness.engine.info = info
    assert (await world.added(world.admin, "sql", 0, replace=True))["warnings"] == []


async def test_a_name_that_is_deleted_while_its_replacement_is_pinned(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was registered was registered, whatever became of its name since then."""
    await world.added(world.admin, "sql", 0, pinned=True)
    catalog = world.harness.services.catalog
    keep = catalog.pins.keep

    async def keeps_what_goes(adapter: Resolved) -> bool:
        kept = await keep(adapter)
        assert (await world.admin.delete(f"{URL}/sql?wait=true")).status_code == 200
        return kept

    monkeypatch.setattr(catalog.pins, "keep", keeps_what_goes)
    answer = await world.upload(world.admin, "sql", 1, replace=True)
    assert (answer.status_code, answer.json()["pinned"]) == (201, False), answer.text
    assert "the name has been deleted meanwhile" in answer.json()["warnings"]
    assert world.harness.engine.pinned == {}
    assert (await world.admin.get(f"{URL}/sql")).status_code == 404


async def test_a_tenant_does_not_change_what_becomes_public_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.added(world.a, "sql", 0)
    catalog = world.harness.services.catalog
    before, own = catalog._before, catalog._own

    async def publish() -> None:
        assert (await world.admin.patch(f"{URL}/sql?tenant=a", json={"public": True})).status_code == 200

    async def late_before(*args: Any) -> Any:
        found = await before(*args)
        await publish()
        return found

    async def late_own(caller: Caller, *args: Any, **options: Any) -> Any:
        found = await own(caller, *args, **options)
        if not caller.admin:
            await publish()
        return found

    monkeypatch.setattr(catalog, "_before", late_before)
    replaced = await world.upload(world.a, "sql", 1, replace=True)
    assert (replaced.status_code, error_of(replaced)["code"]) == (403, "forbidden")
    await world.admin.patch(f"{URL}/sql?tenant=a", json={"public": False})
    monkeypatch.setattr(catalog, "_own", late_own)
    changed = await world.a.patch(f"{URL}/sql", json={"tags": ["x"]})
    assert (changed.status_code, error_of(changed)["code"]) == (403, "forbidden")
    assert (await world.admin.get(f"{URL}/sql?tenant=a")).json()["tags"] == []


async def test_a_source_that_is_not_there_now_is_one_line_of_the_log(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        try:
            raise ConnectionError("no route\nto host")
        except ConnectionError as error:
            raise source_unavailable("source cannot be read: the hub is not reachable") from error

    monkeypatch.setattr("server.catalog.catalog.fetch", fails)
    refused = await world.admin.post(URL, json={"name": "new", "source": "hf://a/b"})
    assert (refused.status_code, error_of(refused)["code"]) == (503, "source_unavailable")
    (record,) = [record for record in caplog.records if record.name == "server.error_handlers"]
    assert record.exc_info is None
    assert record.getMessage() == (
        "POST /admin/v1/adapters: source cannot be read: the hub is not reachable (no route to host)"
    )


async def test_what_can_be_no_name_is_not_remembered(world: World) -> None:
    await world.added(world.admin, "sql", 0, public=True)
    entries = world.harness.store.names._cache._entries
    before = len(entries)
    for name in ("x" * 60_000, "x" * 129, "a b", "sql@", "sql@xyzw", "sql@" + "0" * 65, "../sql", "sql\0"):
        assert (await world.b.get(f"/v1/models/{quote(name)}")).status_code == 404
        assert (await world.use(world.b, name)).status_code in (400, 404)
    assert len(entries) == before
    assert (await world.use(world.b, "sql")).status_code == 200
    assert len(entries) == before + 1
