"""Keys and whose they are."""

import secrets

import pytest

from adapters_store.registry import Quotas, TenantRow
from server.key_ring import KeyRing, make_key
from server.tenants import DEFAULT_TENANT, Caller, Keys, Tenant, Tenants

ADMIN = Caller(DEFAULT_TENANT, admin=True)


def stored(**settings: object) -> tuple[Keys, KeyRing, str]:
    """Keys with one stored for the tenant `acme`."""
    ring, tenants = KeyRing(), Tenants()
    tenants.put(TenantRow("acme", 2.0, Quotas(concurrency=3)))
    row, key = make_key("acme", "", secrets.token_bytes)
    ring.put(row)
    return Keys(**settings, stored=ring, tenants=tenants), ring, key  # type: ignore[arg-type]


async def test_without_keys_everybody_is_the_admin() -> None:
    keys = Keys()
    assert not keys.required
    assert await keys.caller(None) == await keys.caller("anything") == ADMIN
    assert keys.may_read_metrics(None)


@pytest.mark.parametrize(
    ("key", "caller"),
    [
        ("one", Caller(DEFAULT_TENANT)),
        ("two", Caller(DEFAULT_TENANT)),
        ("boss", ADMIN),
        ("meter", None),
        ("on", None),
        ("onee", None),
        ("", None),
        ("öne\ud800", None),
        (None, None),
    ],
)
async def test_callers(key: str | None, caller: Caller | None) -> None:
    assert await Keys(["one", "two"], "boss", "meter").caller(key) == caller


def test_metrics_keys() -> None:
    keys = Keys(["one"], "boss", "meter")
    assert [keys.may_read_metrics(key) for key in ("boss", "meter", "one", "", None)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert not Keys(metrics_key="meter").may_read_metrics(None)


async def test_stored_keys_beside_those_of_the_settings() -> None:
    keys, ring, key = stored(api_keys=["one"], admin_key="boss")
    acme = Caller(Tenant("acme", 2.0, Quotas(concurrency=3)))
    assert [await keys.caller(each) for each in (key, "boss", "one", key[:-1], None)] == [
        acme,
        ADMIN,
        Caller(DEFAULT_TENANT),
        None,
        None,
    ]
    assert not keys.may_read_metrics(key)
    ring.drop_tenant("acme")
    assert await keys.caller(key) is None


async def test_an_open_server_still_knows_tenants() -> None:
    keys, ring, key = stored()
    assert (await keys.caller(key)) == Caller(Tenant("acme", 2.0, Quotas(concurrency=3)))
    assert await keys.caller(None) == await keys.caller("EMPTY") == ADMIN
    ring.drop_tenant("acme")
    assert await keys.caller(key) is None  # a revoked key does not become the admin's


async def test_a_key_of_a_tenant_that_is_not_known_is_nobodys() -> None:
    ring = KeyRing()
    row, key = make_key("acme", "", secrets.token_bytes)
    ring.put(row)
    assert await Keys(stored=ring).caller(key) is None


class TestTenants:
    def test_the_built_in_tenant_is_always_there_and_unlimited(self) -> None:
        tenants = Tenants()
        assert tenants.default == tenants.get("default") == DEFAULT_TENANT
        tenants.replace([TenantRow("default", 3.0, Quotas(concurrency=1)), TenantRow("acme")])
        assert tenants.default == Tenant("default", 3.0)
        tenants.replace([])
        assert tenants.default == DEFAULT_TENANT
        assert tenants.get("acme") is None

    def test_no_two_tenants_have_one_salt(self) -> None:
        ids = ["default", "acme", "acme2", "ACME", "a"]
        assert len({Tenant(each).salt for each in ids}) == len(ids)
        assert all(Tenant(each).salt for each in ids)
