"""/admin/v1/tenants and their keys."""

from world import World, error_of

URL = "/admin/v1/tenants"
QUOTAS = {"requests_per_second": 5.0, "tokens_per_minute": 1000, "concurrency": 2, "adapters": 3, "bytes": 10**6}
NONE = dict.fromkeys(QUOTAS)


async def test_a_tenant_from_beginning_to_end(world: World) -> None:
    created = await world.admin.post(URL, json={"id": "c", "weight": 2.5, "quotas": QUOTAS})
    assert created.status_code == 201, created.text
    answer = created.json()
    assert {key: answer[key] for key in ("id", "weight", "quotas", "default_router")} == {
        "id": "c",
        "weight": 2.5,
        "quotas": QUOTAS,
        "default_router": None,
    }
    assert (await world.admin.get(f"{URL}/c")).json() == answer
    changed = await world.admin.patch(f"{URL}/c", json={"quotas": {"concurrency": 9, "bytes": None}})
    assert changed.json() == answer | {"quotas": QUOTAS | {"concurrency": 9, "bytes": None}}
    changed = await world.admin.patch(f"{URL}/c", json={"weight": 1})
    assert changed.json()["weight"] == 1.0
    assert changed.json()["quotas"]["concurrency"] == 9
    gone = await world.admin.delete(f"{URL}/c")
    assert (gone.status_code, gone.json()) == (200, {"id": "c", "status": "gone"})
    for method in ("GET", "PATCH", "DELETE"):
        response = await world.admin.request(method, f"{URL}/c", json={})
        assert (response.status_code, error_of(response)["code"]) == (404, "tenant_not_found")


async def test_defaults_and_lists(world: World) -> None:
    page = (await world.admin.get(URL, params={"limit": 2})).json()
    assert [(each["id"], each["weight"], each["quotas"]) for each in page["data"]] == [
        ("a", 1.0, NONE),
        ("b", 1.0, NONE),
    ]
    page = (await world.admin.get(URL, params={"limit": 2, "cursor": page["next"]})).json()
    assert ([each["id"] for each in page["data"]], page["next"]) == (["default"], None)


async def test_refusals(world: World) -> None:
    for body, status, code, param in (
        ({}, 400, "missing_required_parameter", "id"),
        ({"id": "a"}, 409, "tenant_exists", "id"),
        ({"id": "a/b"}, 400, "invalid_name", "id"),
        ({"id": "c", "weight": 0}, 400, "invalid_value", "weight"),
        ({"id": "c", "weight": 0.0009}, 400, "invalid_value", "weight"),
        ({"id": "c", "weight": 1001}, 400, "invalid_value", "weight"),
        ({"id": "c", "default_router": "none"}, 404, "router_not_found", "default_router"),
        ({"id": "c", "default_router": "a b"}, 400, "invalid_value", "default_router"),
        ({"id": "c", "default_router": ""}, 400, "invalid_value", "default_router"),
        ({"id": "c", "weight": "1"}, 400, "invalid_type", "weight"),
        ({"id": "c", "quotas": {"concurrency": -1}}, 400, "invalid_value", "quotas.concurrency"),
        ({"id": "c", "quotas": {"requests_per_second": 0}}, 400, "invalid_value", "quotas.requests_per_second"),
        ({"id": "c", "quotas": {"adapters": 1.5}}, 400, "invalid_type", "quotas.adapters"),
    ):
        response = await world.admin.post(URL, json=body)
        assert (response.status_code, error_of(response)["code"]) == (status, code), response.text
        assert param is None or error_of(response)["param"] == param
    patched = await world.admin.patch(f"{URL}/a", json={"default_router": "none"})
    assert (patched.status_code, error_of(patched)["param"]) == (404, "default_router")
    patched = await world.admin.patch(f"{URL}/a", json={"default_router": "retriever"})
    assert (patched.status_code, patched.json()["default_router"]) == (200, "retriever")
    label = await world.admin.post(f"{URL}/a/keys", json={"label": "x\0y"})
    assert (label.status_code, error_of(label)["param"]) == (400, "label")
    built_in = await world.admin.delete(f"{URL}/default")
    assert built_in.status_code == 400
    assert (await world.admin.patch(f"{URL}/default", json={"quotas": {"concurrency": 1}})).status_code == 400
    await world.added(world.a, "sql", 0)
    in_use = await world.admin.delete(f"{URL}/a")
    assert (in_use.status_code, error_of(in_use)["code"]) == (409, "tenant_in_use")


async def test_keys(world: World) -> None:
    created = await world.admin.post(f"{URL}/a/keys", json={"label": "ci"})
    assert created.status_code == 201
    key = created.json()
    assert set(key) == {"id", "label", "created", "revoked", "key"}
    assert (key["label"], key["revoked"]) == ("ci", None)
    headers = {"Authorization": f"Bearer {key['key']}"}
    assert (await world.nobody.get("/v1/models", headers=headers)).status_code == 200
    listed = (await world.admin.get(f"{URL}/a/keys")).json()
    assert sorted(each["label"] for each in listed["data"]) == ["", "ci"]
    assert {name: value for name, value in key.items() if name != "key"} in listed["data"]
    assert key["key"] not in str(listed)
    revoked = await world.admin.delete(f"{URL}/a/keys/{key['id']}")
    assert revoked.status_code == 200
    assert revoked.json()["revoked"] is not None
    assert (await world.nobody.get("/v1/models", headers=headers)).status_code == 401
    for path in (f"{URL}/a/keys/none", f"{URL}/b/keys/{key['id']}"):
        response = await world.admin.delete(path)
        assert (response.status_code, error_of(response)["code"]) == (404, "key_not_found")
    for method in ("GET", "POST"):
        assert (await world.admin.request(method, f"{URL}/none/keys")).status_code == 404


async def test_a_deleted_tenants_keys_are_nobodys(world: World) -> None:
    assert (await world.a.get("/v1/models")).status_code == 200
    assert (await world.admin.delete(f"{URL}/a")).status_code == 200
    assert (await world.a.get("/v1/models")).status_code == 401
