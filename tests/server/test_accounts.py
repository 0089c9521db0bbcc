"""Tenants and keys over a real registry, which another process changes and which fails."""

import asyncio
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adapters_store.registry import (
    InvalidValue,
    NameTaken,
    NotFound,
    Quotas,
    Registry,
    RegistryError,
    RegistryUnavailable,
    TenantRow,
)
from server.accounts import REFRESH_SECONDS, AccountService
from server.key_ring import KeyRing
from server.periodic import repeating
from server.tenants import Caller, Keys, Tenant, Tenants


class Server:
    """What one process has of accounts."""

    def __init__(self, url: str) -> None:
        self.failing: str | None = None
        self.registry = Registry.open(url, lambda: 1000.0, self._fault)
        self.known, self.ring = Tenants(), KeyRing()
        self.service = AccountService(self.registry.accounts, self.known, self.ring, secrets.token_bytes)
        self.service.load()
        self.keys = Keys(admin_key="boss", stored=self.ring, tenants=self.known)

    def close(self) -> None:
        self.service.close()
        self.registry.close()

    def _fault(self, step: str) -> None:
        if self.failing == step:
            raise RegistryUnavailable("as the test wants")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/registry.sqlite"


@pytest.fixture
def server(url: str) -> Iterator[Server]:
    server = Server(url)
    yield server
    server.close()


@pytest.fixture
def other(url: str, server: Server) -> Iterator[Server]:  # noqa: ARG001  the first one makes the schema
    other = Server(url)
    yield other
    other.close()


async def until(condition: object) -> None:
    async with asyncio.timeout(60):
        while not await condition():  # type: ignore[operator]
            await asyncio.sleep(0.005)


async def test_a_tenant_and_its_keys(server: Server) -> None:
    quotas = Quotas(requests_per_second=2.5, concurrency=3)
    made = await server.service.create_tenant(TenantRow("acme", 2.0, quotas))
    assert await server.service.tenant("acme") == made
    row, key = await server.service.create_key("acme", "laptop")
    assert await server.keys.caller(key) == Caller(Tenant("acme", 2.0, quotas))
    assert await server.service.keys("acme") == (row,)
    changed = await server.service.update_tenant("acme", lambda old: replace(old, weight=0.5, quotas=Quotas()))
    assert changed.quotas == Quotas()
    assert await server.keys.caller(key) == Caller(Tenant("acme", 0.5))
    revoked = await server.service.revoke_key("acme", row.id)
    assert revoked.revoked is not None
    assert await server.keys.caller(key) is None
    assert await server.service.keys("acme") == (revoked,)
    _, second = await server.service.create_key("acme")
    await server.service.remove_tenant("acme")
    assert await server.keys.caller(second) is None
    with pytest.raises(NotFound):
        await server.service.keys("acme")


async def test_the_key_is_nowhere_but_in_the_answer(server: Server, tmp_path: Path) -> None:
    await server.service.create_tenant(TenantRow("acme"))
    _, key = await server.service.create_key("acme", "laptop")
    server.close()
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"laptop" in stored
    _, _, secret = key.split("-", 2)  # which may have such signs of its own
    assert secret.encode() not in stored


@pytest.mark.parametrize(
    ("tenant", "field"),
    [
        (TenantRow("acme", weight=0.0), "weight"),
        (TenantRow("acme", weight=float("inf")), "weight"),
        (TenantRow("acme", weight=float("nan")), "weight"),
        (TenantRow("acme", quotas=Quotas(requests_per_second=0.0)), "requests_per_second"),
        (TenantRow("acme", quotas=Quotas(requests_per_second=float("inf"))), "requests_per_second"),
        (TenantRow("acme", quotas=Quotas(tokens_per_minute=0)), "tokens_per_minute"),
        (TenantRow("acme", quotas=Quotas(concurrency=-1)), "concurrency"),
        (TenantRow("acme", quotas=Quotas(adapters=-1)), "adapters"),
        (TenantRow("acme", quotas=Quotas(bytes=-1)), "bytes"),
        (TenantRow("a/b"), "tenant name"),
    ],
)
async def test_what_a_tenant_cannot_have(server: Server, tenant: TenantRow, field: str) -> None:
    with pytest.raises(InvalidValue, match=field):
        await server.service.create_tenant(tenant)
    with pytest.raises(NotFound):
        await server.service.tenant("acme")


async def test_the_built_in_tenant_has_a_weight_but_no_quotas(server: Server) -> None:
    await server.service.update_tenant("default", lambda row: replace(row, weight=4.0))
    assert (await server.keys.caller("boss")) == Caller(Tenant("default", 4.0), admin=True)
    with pytest.raises(InvalidValue, match="unlimited"):
        await server.service.update_tenant("default", lambda row: replace(row, quotas=Quotas(concurrency=1)))
    with pytest.raises(InvalidValue, match="built in"):
        await server.service.remove_tenant("default")


async def test_what_the_registry_refuses_changes_nothing(server: Server) -> None:
    await server.service.create_tenant(TenantRow("acme", 2.0))
    with pytest.raises(NameTaken):
        await server.service.create_tenant(TenantRow("acme", 3.0))
    assert server.known.get("acme") == Tenant("acme", 2.0)
    for missing in (
        server.service.create_key("none"),
        server.service.revoke_key("acme", "none"),
        server.service.remove_tenant("none"),
        server.service.update_tenant("none", lambda row: row),
    ):
        with pytest.raises(NotFound):
            await missing


async def test_all_pages_of_tenants_are_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(7):
        server.registry.accounts.add(TenantRow(f"t{number}"))
    monkeypatch.setattr("server.accounts.PAGE", 3)
    await server.service.refresh()
    assert all(server.known.get(f"t{number}") for number in range(7))
    page = await server.service.tenants(limit=5)
    rest = await server.service.tenants(limit=5, cursor=page.next)
    assert [row.id for row in (*page.items, *rest.items)] == ["default", *(f"t{number}" for number in range(7))]


async def test_changes_of_another_process_arrive(server: Server, other: Server) -> None:
    assert REFRESH_SECONDS <= 0.5  # and a second is promised
    async with repeating(server.service.refresh, 0.01):
        await other.service.create_tenant(TenantRow("acme"))
        row, key = await other.service.create_key("acme")
        await until(lambda: server.keys.caller(key))
        await other.service.update_tenant("acme", lambda old: replace(old, quotas=Quotas(concurrency=1)))

        async def limited() -> bool:
            return await server.keys.caller(key) == Caller(Tenant("acme", quotas=Quotas(concurrency=1)))

        await until(limited)

        async def refused() -> bool:
            return await server.keys.caller(key) is None

        await other.service.revoke_key("acme", row.id)
        await until(refused)


async def test_one_refresh_suffices(server: Server, other: Server) -> None:
    await other.service.create_tenant(TenantRow("acme"))
    row, key = await other.service.create_key("acme")
    assert await server.keys.caller(key) is None
    await server.service.refresh()
    assert await server.keys.caller(key) == Caller(Tenant("acme"))
    await other.service.revoke_key("acme", row.id)
    await server.service.refresh()
    assert await server.keys.caller(key) is None


async def test_nothing_is_read_again_that_has_not_changed(
    server: Server, other: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, read = 0, server.registry.accounts.active_keys

    def count() -> object:
        nonlocal reads
        reads += 1
        return read()

    monkeypatch.setattr(server.registry.accounts, "active_keys", count)
    for _ in range(3):
        await server.service.refresh()
    assert reads == 0
    await other.service.create_tenant(TenantRow("acme"))
    for _ in range(3):
        await server.service.refresh()
    assert reads == 1
    assert server.known.get("acme") is not None


async def test_own_changes_are_not_undone_by_a_refresh_under_way(server: Server) -> None:
    await server.service.create_tenant(TenantRow("acme"))
    row, key = await server.service.create_key("acme")
    for _ in range(20):
        refreshing = asyncio.create_task(server.service.refresh())
        await asyncio.sleep(0)
        (row, key), _ = await asyncio.gather(server.service.create_key("acme"), refreshing)
        assert await server.keys.caller(key) == Caller(Tenant("acme"))
        refreshing = asyncio.create_task(server.service.refresh())
        await asyncio.sleep(0)
        await asyncio.gather(server.service.revoke_key("acme", row.id), refreshing)
        assert await server.keys.caller(key) is None


async def test_without_the_registry_what_was_known_stays(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await server.service.create_tenant(TenantRow("acme"))
    row, key = await server.service.create_key("acme")

    def fail() -> None:
        raise RegistryUnavailable("as the test wants")

    with monkeypatch.context() as patch:
        patch.setattr(server.registry.accounts, "active_keys", fail)
        for _ in range(3):
            await server.service.refresh()
        assert await server.keys.caller(key) == Caller(Tenant("acme"))
        server.failing = "revoke_key.begin"
        with pytest.raises(RegistryError) as refused:
            await server.service.revoke_key("acme", row.id)
        assert refused.value.status == 503
        assert await server.keys.caller(key) == Caller(Tenant("acme"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    server.failing = None
    server.registry.accounts.revoke_key("acme", row.id)
    await server.service.refresh()
    assert await server.keys.caller(key) is None
