"""What a tenant's key may do on the admin surface, and what needs the admin key."""

from pathlib import Path
from typing import Any

import httpx
from world import World, error_of

V1 = "/admin/v1"
ADMIN_ONLY = [
    ("GET", f"{V1}/tenants"),
    ("POST", f"{V1}/tenants"),
    ("GET", f"{V1}/tenants/a"),
    ("PATCH", f"{V1}/tenants/a"),
    ("DELETE", f"{V1}/tenants/a"),
    ("GET", f"{V1}/tenants/a/keys"),
    ("POST", f"{V1}/tenants/a/keys"),
    ("DELETE", f"{V1}/tenants/a/keys/abc"),
    ("GET", f"{V1}/state"),
    ("POST", f"{V1}/drain"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
]
FOR_TENANTS = [
    ("GET", f"{V1}/adapters"),
    ("POST", f"{V1}/adapters"),
    ("GET", f"{V1}/adapters/sql"),
    ("PATCH", f"{V1}/adapters/sql"),
    ("DELETE", f"{V1}/adapters/sql"),
    ("POST", f"{V1}/adapters/sql/prefetch"),
    ("POST", f"{V1}/merges"),
    ("GET", f"{V1}/usage"),
]


def forbidden(response: httpx.Response, param: str | None = None) -> None:
    assert response.status_code == 403, response.text
    error = error_of(response)
    assert (error["type"], error["param"]) == ("permission_error", param)


async def test_every_endpoint_needs_a_key(world: World) -> None:
    for method, path in ADMIN_ONLY + FOR_TENANTS:
        response = await world.nobody.request(method, path)
        assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key"), path


async def test_what_needs_the_admin_key(world: World) -> None:
    for client in (world.a, world.member):
        for method, path in ADMIN_ONLY:
            response = await client.request(method, path, json={})
            forbidden(response)
    assert not world.harness.services.generator.is_draining


async def test_tenants_decide_nothing_for_others(world: World, roots: Path) -> None:
    world.make(5).rename(roots / "sql")
    await world.added(world.a, "mine", 0)
    for field in ("public", "pinned"):
        forbidden(await world.upload(world.a, "new", 1, **{field: True}), field)
        for value in (True, False):
            forbidden(await world.a.patch(f"{V1}/adapters/mine", json={field: value}), field)
        merge = {"name": "new", "adapters": [{"name": "mine"}], "method": "cat"}
        response = await world.a.post(f"{V1}/merges", json=merge | {field: True})
        assert response.status_code == (403 if field == "public" else 400)
    source = {"name": "new", "source": f"file://{roots}/sql"}
    response = await world.a.post(f"{V1}/adapters", json=source)
    forbidden(response, "source")
    assert error_of(response)["code"] == "source_not_allowed"
    for tenant in ("b", "default", "never-was"):
        forbidden(await world.upload(world.a, "new", 1, tenant=tenant), "tenant")
        for method, path in FOR_TENANTS:
            if path.endswith("/merges") or (method, path) == ("POST", f"{V1}/adapters"):
                continue
            forbidden(await world.a.request(method, path, params={"tenant": tenant}, json={}), "tenant")
    assert [each["name"] for each in (await world.a.get(f"{V1}/adapters")).json()["data"]] == ["mine"]
    assert (await world.a.get(f"{V1}/adapters", params={"tenant": "a"})).status_code == 200


async def test_public_adapters_are_the_administrators(world: World) -> None:
    """A tenant sees them, and changes none, not even its own after it was made public."""
    await world.added(world.admin, "theirs", 0, public=True)
    mine = await world.added(world.a, "mine", 1)
    assert (await world.admin.patch(f"{V1}/adapters/mine?tenant=a", json={"public": True})).status_code == 200
    for name in ("theirs", "mine"):
        assert (await world.a.get(f"{V1}/adapters/{name}")).status_code == 200
        forbidden(await world.a.patch(f"{V1}/adapters/{name}", json={"tags": ["t"]}))
        forbidden(await world.a.patch(f"{V1}/adapters/{name}", json={"digest": mine["digest"]}))
        forbidden(await world.a.delete(f"{V1}/adapters/{name}"))
    forbidden(await world.upload(world.a, "mine", 2, replace=True))
    forbidden(await world.a.post(f"{V1}/adapters/theirs/prefetch"))
    assert (await world.a.post(f"{V1}/adapters/mine/prefetch")).status_code == 200
    merge = {"name": "mine", "adapters": [{"name": "theirs"}], "method": "cat", "replace": True}
    forbidden(await world.a.post(f"{V1}/merges", json=merge))
    assert (await world.b.get(f"{V1}/adapters/mine")).json()["digest"] == mine["digest"]
    # A name of one's own hides the public one.
    await world.added(world.a, "theirs", 3, replace=True)
    used = (await world.use(world.a, "theirs")).json()["lora"]["adapters"][0]["digest"]
    assert used != (await world.use(world.b, "theirs")).json()["lora"]["adapters"][0]["digest"]


async def test_the_built_in_tenants_keys_are_no_admins(world: World) -> None:
    await world.added(world.member, "mine", 0)
    assert (await world.admin.get(f"{V1}/adapters/mine")).status_code == 200
    await world.added(world.admin, "public", 1, public=True)
    forbidden(await world.member.delete(f"{V1}/adapters/public"))
    assert (await world.member.delete(f"{V1}/adapters/mine")).status_code == 200


async def test_the_administrator_acts_for_tenants(world: World) -> None:
    for_a = {"tenant": "a"}
    await world.added(world.admin, "sql", 0, tenant="a")
    assert (await world.admin.get(f"{V1}/adapters/sql")).status_code == 404
    assert (await world.admin.get(f"{V1}/adapters/sql", params=for_a)).json()["tenant"] == "a"
    listed = (await world.admin.get(f"{V1}/adapters", params=for_a)).json()["data"]
    assert [each["name"] for each in listed] == ["sql"]
    assert (await world.use(world.a, "sql")).status_code == 200
    assert (await world.use(world.admin, "sql")).status_code == 404
    patched = await world.admin.patch(f"{V1}/adapters/sql", params=for_a, json={"tags": ["x"]})
    assert patched.json()["tags"] == ["x"]
    merge = {"name": "two", "adapters": [{"name": "sql"}], "method": "cat", "tenant": "a"}
    assert (await world.admin.post(f"{V1}/merges", json=merge)).status_code == 201
    assert (await world.a.get(f"{V1}/adapters/two")).status_code == 200
    assert (await world.admin.delete(f"{V1}/adapters/sql", params=for_a)).status_code == 200
    # Only own names are changed: a public one is not the tenant's, however it is addressed.
    await world.added(world.admin, "public", 1, public=True)
    assert (await world.admin.delete(f"{V1}/adapters/public", params=for_a)).status_code == 404


async def test_unknown_fields_and_parameters(world: World) -> None:
    await world.added(world.admin, "sql", 0)
    bodies: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", f"{V1}/adapters", {"name": "x", "source": "hf://a/b"}),
        ("PATCH", f"{V1}/adapters/sql", {}),
        ("POST", f"{V1}/merges", {"name": "x", "adapters": [{"name": "sql"}], "method": "cat"}),
        ("POST", f"{V1}/tenants", {"id": "x"}),
        ("PATCH", f"{V1}/tenants/a", {}),
        ("POST", f"{V1}/tenants/a/keys", {}),
    ]
    for method, path, body in bodies:
        response = await world.admin.request(method, path, json=body | {"what": 1})
        assert response.status_code == 400, path
        assert (error_of(response)["param"], error_of(response)["code"]) == ("what", "unknown_parameter")
    nested = {"name": "x", "adapters": [{"name": "sql", "wait": 2}], "method": "cat"}
    assert error_of(await world.admin.post(f"{V1}/merges", json=nested))["param"] == "adapters.0.wait"
    quotas = {"id": "x", "quotas": {"rps": 1}}
    assert error_of(await world.admin.post(f"{V1}/tenants", json=quotas))["param"] == "quotas.rps"
    known = {path: body for _, path, body in bodies}
    for method, path in ADMIN_ONLY + FOR_TENANTS:
        if not path.startswith(V1):
            continue
        response = await world.admin.request(method, f"{path}?what=1", json=known.get(path, {}))
        assert response.status_code == 400, (method, path, response.text)
        assert (error_of(response)["param"], error_of(response)["code"]) == ("what", "unknown_parameter")
    for query, param in (
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=many", "limit"),
        ("residency=cloud", "residency"),
        ("tenant=", "tenant"),
    ):
        response = await world.admin.get(f"{V1}/adapters?{query}")
        assert (response.status_code, error_of(response)["param"]) == (400, param)
    assert error_of(await world.admin.delete(f"{V1}/adapters/sql?wait=perhaps"))["param"] == "wait"
    for day in ("soon", "2026-02-30", "2026-01-01T01:00"):
        error = error_of(await world.admin.get(f"{V1}/usage?since={day}"))
        assert (error["param"], error["message"]) == ("since", "since: expected a day such as 2026-01-31")
    assert error_of(await world.admin.get(f"{V1}/usage?cursor=x"))["param"] == "cursor"
    assert (await world.admin.get(f"{V1}/adapters/sql")).status_code == 200
    assert (await world.admin.get(f"{V1}/tenants/x")).status_code == 404
