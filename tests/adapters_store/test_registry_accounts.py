"""Tenants, keys, routers, and what is counted."""

from dataclasses import replace
from datetime import date

import pytest

from adapters_store.registry import (
    DEFAULT_TENANT,
    InvalidValue,
    KeyRow,
    NameTaken,
    NotFound,
    Quotas,
    Registry,
    RegistryError,
    RouterRow,
    TenantRow,
    UsageRow,
    Use,
)
from tests.adapters_store.registered import DAY, adapter, parallel


class TestAccounts:
    def test_tenants(self, registry: Registry) -> None:
        accounts = registry.accounts
        quotas = Quotas(0.5, 60_000, 4, 10, 1 << 40)
        made = accounts.add(TenantRow("big", 2.5, quotas, "retriever"))
        assert accounts.get("big") == made
        assert made.quotas == quotas
        assert [row.id for row in accounts.list().items] == ["acme", "big", "default", "umbrella"]
        page = accounts.list(limit=2)
        assert [row.id for row in accounts.list(limit=2, cursor=page.next).items] == ["default", "umbrella"]
        changed = accounts.update("big", lambda row: replace(row, id="x", weight=1.0, quotas=Quotas(), created=0.0))
        assert changed == TenantRow("big", 1.0, Quotas(), "retriever", made.created) == accounts.get("big")
        with pytest.raises(NameTaken, match="tenant 'big' exists"):
            accounts.add(TenantRow("big"))
        with pytest.raises(InvalidValue, match="tenant name"):
            accounts.add(TenantRow("a/b"))
        for missing in (accounts.get, accounts.remove, lambda name: accounts.update(name, lambda row: row)):
            with pytest.raises(NotFound, match="tenant 'none' does not exist"):
                missing("none")

    def test_removing_a_tenant(self, registry: Registry) -> None:
        registry.accounts.add_key(KeyRow("k1", "acme", "laptop", b"\0salt", b"\xffhash"))
        registry.register("acme", "sql", adapter("a"))
        registry.ledger.add([UsageRow("acme", "sql", DAY, 1, 1, 1)])
        with pytest.raises(RegistryError, match="has adapters") as refused:
            registry.accounts.remove("acme")
        assert (refused.value.code, refused.value.status) == ("tenant_in_use", 409)
        registry.removals.remove("acme", "sql")
        registry.accounts.remove("acme")
        assert registry.accounts.active_keys() == ()
        assert len(registry.ledger.read("acme").items) == 1
        with pytest.raises(InvalidValue, match="built in"):
            registry.accounts.remove(DEFAULT_TENANT)

    def test_keys(self, registry: Registry) -> None:
        accounts = registry.accounts
        one = accounts.add_key(KeyRow("k1", "acme", "laptop", b"\0salt", b"\xffhash"))
        two = accounts.add_key(KeyRow("k2", "umbrella", "", b"", b"h"))
        assert accounts.active_keys() == (one, two)
        assert accounts.keys("acme") == (one,)
        with pytest.raises(NotFound, match="key 'k1' does not exist"):
            accounts.revoke_key("umbrella", "k1")
        revoked = accounts.revoke_key("acme", "k1")
        assert revoked.revoked is not None
        assert accounts.revoke_key("acme", "k1") == revoked
        assert accounts.active_keys() == (two,)
        assert accounts.keys("acme") == (revoked,)
        with pytest.raises(NameTaken, match="key 'k2' exists"):
            accounts.add_key(KeyRow("k2", "acme", "", b"", b""))
        with pytest.raises(NotFound, match="tenant 'none'"):
            accounts.add_key(KeyRow("k3", "none", "", b"", b""))

    def test_every_change_has_a_version(self, registry: Registry) -> None:
        accounts = registry.accounts
        versions = [accounts.version()]
        for change in (
            lambda: accounts.add(TenantRow("big")),
            lambda: accounts.update("big", lambda row: replace(row, weight=2.0)),
            lambda: accounts.add_key(KeyRow("k1", "big", "", b"", b"h")),
            lambda: accounts.revoke_key("big", "k1"),
            lambda: accounts.remove("big"),
        ):
            change()
            versions.append(accounts.version())
            assert accounts.version() == versions[-1]
        assert len(set(versions)) == 6
        with pytest.raises(NameTaken):
            accounts.add(TenantRow("acme"))
        assert accounts.version() == versions[-1]
        parallel(8, lambda number: accounts.add_key(KeyRow(f"p{number}", "acme", "", b"", b"h")))
        assert int(accounts.version()) == int(versions[-1]) + 8

    def test_routers(self, registry: Registry) -> None:
        first = registry.routers.add(RouterRow("moa", "moa", "e" * 64, {"adapters": ["a"], "accuracy": 0.5}))
        registry.accounts.update("acme", lambda row: replace(row, default_router="moa"))
        with pytest.raises(NameTaken, match="router 'moa' exists"):
            registry.routers.add(RouterRow("moa", "moa", "f" * 64, {}))
        assert registry.routers.list() == (first,)
        second = registry.routers.add(RouterRow("moa", "meteora", "f" * 64, {}), replace_existing=True)
        assert registry.routers.list() == (second,)
        assert registry.referenced_blobs() == {"f" * 64}
        before = registry.accounts.version()
        registry.routers.remove("moa")
        assert registry.accounts.get("acme").default_router is None
        assert registry.accounts.version() != before
        with pytest.raises(NotFound, match="router 'moa'"):
            registry.routers.remove("moa")

    def test_what_adapters_of_a_router_mean_now(self, registry: Registry) -> None:
        assert registry.routers.meanings(["sql"]) == registry.routers.targets(["a" * 64]) == {}
        registry.register("acme", "sql", adapter("a"))
        registry.register("umbrella", "sql", adapter("b"))
        registry.register("umbrella", "sea", adapter("a"))
        assert registry.routers.meanings(["sql", "sea", "none"]) == {"sql": {"a" * 64, "b" * 64}, "sea": {"a" * 64}}
        registry.register("acme", "sql", adapter("c"), replace=True)
        registry.removals.mark("umbrella", "sea", True)
        assert registry.routers.meanings(["sql", "sea"]) == {"sql": {"b" * 64, "c" * 64}}
        found = registry.routers.targets(["a" * 64, "c" * 64, "d" * 64])
        assert found == {digit * 64: adapter(digit).targets for digit in "ac"}


class TestCounters:
    def test_uses_are_those_of_the_asking_tenant(self, registry: Registry) -> None:
        registry.register("acme", "sql", adapter("a"), public=True)
        gone = Use("acme", "acme", "gone", 1, 1.0)
        registry.uses.touch([Use("acme", "acme", "sql", 2, 50.0), Use("acme", "acme", "sql", 1, 40.0), gone])
        registry.uses.touch([Use("acme", "acme", "sql", 1, 45.0), Use("umbrella", "acme", "sql", 7, 60.0)])
        registry.uses.touch([])
        counted = [(each.requests, each.last_used) for each in registry.list("acme").items]
        assert counted == [(4, 50.0)]
        assert registry.get("umbrella", "sql").requests == 7
        assert registry.get(DEFAULT_TENANT, "sql").last_used is None

    def test_the_ledger_adds_up(self, registry: Registry) -> None:
        line = UsageRow("acme", "sql", DAY, 1, 10, 5)
        registry.ledger.add([line, line, UsageRow("acme", "", DAY, 1, 1, 1)])
        parallel(8, lambda _: registry.ledger.add([line, UsageRow("umbrella", "sql", DAY, 1, 0, 0)]))
        assert registry.ledger.read("acme").items == (
            UsageRow("acme", "", DAY, 1, 1, 1),
            UsageRow("acme", "sql", DAY, 10, 100, 50),
        )
        assert registry.ledger.read("umbrella").items == (UsageRow("umbrella", "sql", DAY, 8, 0, 0),)

    def test_a_batch_that_is_sent_again_counts_once(self, registry: Registry) -> None:
        line = UsageRow("acme", "sql", DAY, 1, 10, 5)
        for number in (1, 1, 2, 1, 2, 5):
            registry.ledger.add([line], "one", number)
        registry.ledger.add([line], "another", 1)
        assert registry.ledger.read("acme").items[0].requests == 4
        registry.ledger.leave("one")
        registry.ledger.leave("nobody")
        registry.ledger.add([line], "another", 1)
        registry.ledger.add([line], "one", 1)
        assert registry.ledger.read("acme").items[0].requests == 5

    def test_the_ledger_is_read_by_days_and_pages(self, registry: Registry) -> None:
        days = [date(2026, 3, day) for day in (1, 2, 3)]
        lines = [UsageRow(tenant, "sql", day, 1, 2, 3) for day in days for tenant in ("acme", "umbrella")]
        registry.ledger.add(lines)
        first = registry.ledger.read(None, limit=4)
        assert first.items == tuple(lines[:4])
        rest = registry.ledger.read(None, limit=4, cursor=first.next)
        assert (rest.items, rest.next) == (tuple(lines[4:]), None)
        assert registry.ledger.read("acme", since=days[1], until=days[1]).items == (lines[2],)
        with pytest.raises(InvalidValue, match="cursor"):
            registry.ledger.read(None, cursor="nonsense")
