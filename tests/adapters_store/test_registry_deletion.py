"""Names and adapters that go, also while others come."""

from concurrent.futures import Future, ThreadPoolExecutor, wait

import pytest

from adapters_store.registry import (
    DEFAULT_TENANT,
    BeingDeleted,
    Database,
    NotFound,
    Outcome,
    Registry,
    TenantRow,
    open_engine,
)
from tests.adapters_store.registered import MakeUrl, adapter, parallel


class TestDeletion:
    def test_marked_names_are_hidden_and_still_taken(self, registry: Registry) -> None:
        registry.register("acme", "sql", adapter("a"))
        registry.register("acme", "sql", adapter("b"), replace=True)
        assert registry.removals.mark("acme", "sql") == ("a" * 64, "b" * 64)
        assert registry.removals.mark("acme", "sql") == ("a" * 64, "b" * 64)
        assert registry.removals.marked() == (("acme", "sql"),)
        assert registry.list("acme").items == ()
        assert registry.resolve("acme", ["sql", "sql@aaaa"]) == {}
        for refused in (registry.get, registry.update):
            with pytest.raises(NotFound):
                refused("acme", "sql")
        with pytest.raises(BeingDeleted, match="is being deleted"):
            registry.register("acme", "sql", adapter("a"), replace=True)
        assert len(registry.referenced_blobs()) == 4
        registry.removals.mark("acme", "sql", deleting=False)
        assert registry.get("acme", "sql").adapter.digest == "b" * 64

    def test_blobs_go_with_the_last_name(self, registry: Registry) -> None:
        registry.register("acme", "sql", adapter("a"), tags=["t"])
        registry.register("acme", "sql", adapter("b"), replace=True)
        registry.register("umbrella", "copy", adapter("a"))
        assert registry.removals.remove("acme", "sql") == ("b" * 64,)
        assert registry.referenced_blobs() == {adapter("a").config_blob, adapter("a").weights_blob}
        assert registry.removals.remove("umbrella", "copy") == ("a" * 64,)
        assert registry.referenced_blobs() == frozenset()
        with pytest.raises(NotFound):
            registry.removals.remove("umbrella", "copy")
        done = registry.register("acme", "sql", adapter("b"))
        assert (done.outcome, done.adapter.tags, len(done.adapter.revisions)) == (Outcome.CREATED, (), 1)

    def test_removal_waits_for_a_registration_of_the_same_digest(self, make_url: MakeUrl) -> None:
        url = make_url()
        registry = Registry.open(url, lambda: 1.0)
        registry.accounts.add(TenantRow("acme"))
        registry.register("acme", "old", adapter("a"))
        with ThreadPoolExecutor(1) as pool:
            removals: list[Future[tuple[str, ...]]] = []

            def remove_meanwhile(step: str) -> None:
                if step == "register.quota":
                    removals.append(pool.submit(registry.removals.remove, "acme", "old"))
                    wait(removals, timeout=0.2)

            other = Registry(Database(open_engine(url), lambda: 1.0, remove_meanwhile))
            other.register(DEFAULT_TENANT, "new", adapter("a"))
            assert removals[0].result() == ()
        assert registry.get(DEFAULT_TENANT, "new").adapter.digest == "a" * 64
        other.close()
        registry.close()

    def test_removal_beside_registration_of_the_same_digest(self, registry: Registry) -> None:
        def churn(index: int) -> None:
            tenant, other = ("acme", "umbrella") if index % 2 else ("umbrella", "acme")
            registry.register(tenant, f"n{index}", adapter("a"))
            registry.register(other, f"n{index}", adapter("b"))
            registry.removals.remove(tenant, f"n{index}")

        assert parallel(16, churn) == [None] * 16
        assert len(registry.list("acme").items) == len(registry.list("umbrella").items) == 8
        assert registry.referenced_blobs() == {adapter("b").config_blob, adapter("b").weights_blob}

    def test_only_what_is_marked_may_be_removed(self, registry: Registry) -> None:
        registry.register("acme", "sql", adapter("a"))
        with pytest.raises(NotFound):
            registry.removals.remove("acme", "sql", only_marked=True)
        registry.removals.mark("acme", "sql")
        assert registry.known(["a" * 64, "b" * 64]) == {"a" * 64}
        assert (registry.count(), registry.count_names()) == (1, 0)
        assert registry.removals.remove("acme", "sql", only_marked=True) == ("a" * 64,)
        assert registry.known(["a" * 64]) == frozenset()
        assert registry.count() == 0
