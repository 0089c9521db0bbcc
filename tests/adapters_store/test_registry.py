"""Registration: names, revisions, races and quotas, each test on SQLite and on a real PostgreSQL."""

from collections import Counter
from dataclasses import replace

import pytest

from adapters_store.registry import (
    DEFAULT_TENANT,
    BeingDeleted,
    InvalidValue,
    NameTaken,
    NotFound,
    NotPermitted,
    Outcome,
    QuotaExceeded,
    Quotas,
    Registry,
)
from tests.adapters_store.registered import MakeUrl, adapter, parallel


class TestRegister:
    def test_what_is_registered_is_found_again(self, registry: Registry) -> None:
        done = registry.register(
            "acme",
            "sql",
            adapter("a"),
            pinned=True,
            description="writes SQL",
            tags=["code", "b", "code"],
            samples=["x"],
        )
        assert done.outcome is Outcome.CREATED
        assert done.adapter == registry.get("acme", "sql")
        found = done.adapter
        assert found.adapter == replace(adapter("a"), created=found.created)
        assert (found.tenant, found.public, found.pinned, found.description) == ("acme", False, True, "writes SQL")
        assert (found.tags, found.requests, found.last_used) == (("b", "code"), 0, None)
        assert [(each.number, each.digest, each.created) for each in found.revisions] == [(1, "a" * 64, found.created)]
        assert registry.samples("acme", ["sql", "other"]) == {"sql": ("x",)}

    def test_it_survives_reopening(self, make_url: MakeUrl) -> None:
        url = make_url()
        first = Registry.open(url, lambda: 5.0)
        stored = first.register(DEFAULT_TENANT, "sql", adapter("a")).adapter
        first.close()
        again = Registry.open(url, lambda: 6.0)
        assert again.get(DEFAULT_TENANT, "sql") == stored
        again.close()

    def test_a_name_that_exists_is_refused_and_unchanged(self, registry: Registry) -> None:
        before = registry.register("acme", "sql", adapter("a")).adapter
        with pytest.raises(NameTaken, match="'sql' exists") as refused:
            registry.register("acme", "sql", adapter("b"), public=True)
        assert (refused.value.code, refused.value.status) == ("adapter_exists", 409)
        assert registry.get("acme", "sql") == before
        assert registry.referenced_blobs() == {before.adapter.config_blob, before.adapter.weights_blob}

    def test_replacement_makes_a_revision_and_keeps_what_is_not_given(self, registry: Registry) -> None:
        registry.register("acme", "sql", adapter("a"), description="old", tags=["x"], samples=["s"], public=True)
        done = registry.register("acme", "sql", adapter("b"), description="new", replace=True)
        assert done.outcome is Outcome.REVISED
        assert done.adapter.adapter.digest == "b" * 64
        assert (done.adapter.description, done.adapter.tags, done.adapter.public) == ("new", ("x",), True)
        assert [(each.number, each.digest[0]) for each in done.adapter.revisions] == [(1, "a"), (2, "b")]
        assert registry.samples("acme", ["sql"]) == {"sql": ("s",)}

    def test_the_same_digest_makes_no_revision(self, registry: Registry) -> None:
        first = registry.register("acme", "sql", adapter("a")).adapter
        done = registry.register("acme", "sql", adapter("a"), replace=True, tags=["t"])
        assert done.outcome is Outcome.SAME
        assert done.adapter == replace(first, tags=("t",))

    def test_an_older_digest_becomes_current_again(self, registry: Registry) -> None:
        registry.register("acme", "sql", adapter("a"))
        registry.register("acme", "sql", adapter("b"), replace=True)
        done = registry.register("acme", "sql", adapter("a"), replace=True)
        assert done.outcome is Outcome.REVISED
        assert done.adapter.adapter.digest == "a" * 64
        assert [each.digest[0] for each in done.adapter.revisions] == ["a", "b"]

    def test_rolling_back_moves_only_the_pointer(self, registry: Registry) -> None:
        registry.register("acme", "sql", adapter("a"))
        newer = registry.register("acme", "sql", adapter("b"), replace=True).adapter
        rolled = registry.roll_back("acme", "sql", "a" * 64)
        assert rolled.adapter.digest == "a" * 64
        assert rolled.revisions == newer.revisions
        registry.register("acme", "other", adapter("c"))
        with pytest.raises(NotFound, match="revision"):
            registry.roll_back("acme", "sql", "c" * 64)
        with pytest.raises(NotFound, match="adapter 'sql' does not exist"):
            registry.roll_back("umbrella", "sql", "a" * 64)

    def test_the_last_blobs_of_a_digest_count(self, registry: Registry) -> None:
        """They are the same for everybody, unless a former version stored what came first as it came."""
        registry.register("acme", "sql", replace(adapter("a"), warnings=("old",)))
        stored = replace(adapter("a"), weights_blob="e" * 64, config_blob="f" * 64, bytes=7, alpha=3.0, warnings=())
        found = registry.register("umbrella", "sql", stored).adapter.adapter
        assert replace(found, created=0.0) == stored
        assert registry.get("acme", "sql").adapter == found
        assert registry.referenced_blobs() == {"e" * 64, "f" * 64}
        assert (registry.count(), registry.count_names()) == (1, 2)

    def test_what_would_be_refused_is_known_before(self, registry: Registry) -> None:
        registry.register("acme", "sql", adapter("a", size=60))
        registry.register("umbrella", "shown", adapter("b"), public=True)
        registry.check_new("acme", "new")
        registry.check_new("acme", "sql", replace=True)
        registry.check_new("umbrella", "sql", public=True)
        with pytest.raises(InvalidValue):
            registry.check_new("acme", "-x")
        with pytest.raises(NotFound, match="tenant 'nobody' does not exist"):
            registry.check_new("nobody", "new")
        with pytest.raises(NameTaken, match="'sql' exists"):
            registry.check_new("acme", "sql")
        with pytest.raises(NameTaken, match="public adapter 'shown' exists"):
            registry.check_new("acme", "shown", public=True)
        registry.accounts.update("acme", lambda row: replace(row, quotas=Quotas(adapters=1, bytes=100)))
        registry.check_new("acme", "sql", replace=True, digest="b" * 64, size=40)
        registry.check_new("acme", "sql", replace=True, digest="a" * 64, size=60)
        with pytest.raises(QuotaExceeded, match="quota of 100 bytes"):
            registry.check_new("acme", "sql", replace=True, digest="b" * 64, size=41)
        with pytest.raises(QuotaExceeded, match="quota of 1 adapters"):
            registry.check_new("acme", "new")
        registry.removals.mark("acme", "sql")
        with pytest.raises(BeingDeleted):
            registry.check_new("acme", "sql", replace=True)

    def test_a_name_made_public_meanwhile_is_the_administrators(self, registry: Registry) -> None:
        registry.register("acme", "sql", adapter("a"), may_be_public=False)
        registry.register("acme", "sql", adapter("b"), replace=True, may_be_public=False)
        registry.update("acme", "sql", description="x", may_be_public=False)
        registry.roll_back("acme", "sql", "a" * 64, may_be_public=False)
        before = registry.update("acme", "sql", public=True)
        for change in (
            lambda: registry.register("acme", "sql", adapter("c"), replace=True, may_be_public=False),
            lambda: registry.check_new("acme", "sql", replace=True, may_be_public=False),
            lambda: registry.update("acme", "sql", description="y", may_be_public=False),
            lambda: registry.roll_back("acme", "sql", "b" * 64, may_be_public=False),
        ):
            with pytest.raises(NotPermitted, match="'sql' is public") as caught:
                change()
            assert (caught.value.code, caught.value.status) == ("forbidden", 403)
        assert registry.get("acme", "sql") == before
        registry.register("acme", "sql", adapter("c"), replace=True)

    def test_two_hundred_at_once_have_one_winner(self, registry: Registry) -> None:
        digits = "0123456789abcdef"
        results = parallel(200, lambda index: registry.register("acme", "sql", adapter(digits[index % 16])))
        kinds = Counter(type(result).__name__ for result in results)
        assert kinds == {"Registration": 1, "NameTaken": 199}
        stored = registry.get("acme", "sql")
        assert len(stored.revisions) == 1
        assert registry.referenced_blobs() == {stored.adapter.config_blob, stored.adapter.weights_blob}

    def test_replacements_at_once_number_their_revisions(self, registry: Registry) -> None:
        digits = "0123456789abcdef"
        parallel(32, lambda index: registry.register("acme", "sql", adapter(digits[index % 16]), replace=True))
        revisions = registry.get("acme", "sql").revisions
        assert [each.number for each in revisions] == list(range(1, 17))
        assert sorted(each.digest[0] for each in revisions) == list(digits)

    def test_an_unknown_tenant_is_refused(self, registry: Registry) -> None:
        with pytest.raises(NotFound, match="tenant 'nobody' does not exist"):
            registry.register("nobody", "sql", adapter("a"))

    def test_bad_names_are_refused(self, registry: Registry) -> None:
        for name in ("", "a b", "-x", "a/b", "x" * 129, "a\0", "a\n"):
            with pytest.raises(InvalidValue, match="adapter name") as refused:
                registry.register("acme", name, adapter("a"))
            assert (refused.value.code, refused.value.status) == ("invalid_name", 400)

    def test_text_that_cannot_be_stored_is_refused(self, registry: Registry) -> None:
        for options in ({"description": "a\0b"}, {"tags": ["\ud800"]}, {"samples": ["fine", "\0"]}):
            with pytest.raises(InvalidValue, match=f"'{next(iter(options))}'"):
                registry.register("acme", "sql", adapter("a"), **options)
        assert registry.list("acme").items == ()
        registry.register("acme", "sql", adapter("a"), description="größer \U0001f600", tags=["ü"])
        assert registry.get("acme", "sql").description == "größer \U0001f600"

    def test_searching_for_nonsense_finds_nothing(self, registry: Registry) -> None:
        with pytest.raises(NotFound):
            registry.get("acme", "a\0b")
        assert registry.resolve("acme", ["a\0b", "@", "x@\0\0\0\0", "\ud800"]) == {}


class TestQuotas:
    def test_parallel_registrations_stay_within_the_quota_of_adapters(self, registry: Registry) -> None:
        registry.accounts.update("acme", lambda row: replace(row, quotas=Quotas(adapters=3)))
        results = parallel(12, lambda index: registry.register("acme", f"n{index}", adapter("0123456789ab"[index])))
        refused = [result for result in results if isinstance(result, QuotaExceeded)]
        assert len(registry.list("acme").items) == 3
        assert len(refused) == 9
        assert {(each.code, each.status) for each in refused} == {("quota_adapters", 429)}
        assert registry.register("acme", registry.list("acme").items[0].name, adapter("b"), replace=True)
        assert registry.register("umbrella", "free", adapter("a"))

    def test_bytes_count_each_digest_of_the_tenant_once(self, registry: Registry) -> None:
        registry.accounts.update("acme", lambda row: replace(row, quotas=Quotas(bytes=250)))
        registry.register("umbrella", "large", adapter("f", size=1000))
        registry.register("acme", "one", adapter("a", size=100))
        registry.register("acme", "same", adapter("a", size=100))
        registry.register("acme", "one", adapter("b", size=150), replace=True)
        with pytest.raises(QuotaExceeded, match="250 bytes") as refused:
            registry.register("acme", "two", adapter("c", size=1))
        assert refused.value.code == "quota_bytes"
        with pytest.raises(NotFound):
            registry.get("acme", "two")
        registry.removals.remove("acme", "one")
        assert registry.register("acme", "two", adapter("c", size=150)).outcome is Outcome.CREATED

    def test_a_lowered_quota_does_not_refuse_what_is_there(self, registry: Registry) -> None:
        registry.register("acme", "sql", adapter("a"))
        registry.accounts.update("acme", lambda row: replace(row, quotas=Quotas(adapters=0, bytes=0)))
        assert registry.register("acme", "sql", adapter("a"), replace=True).outcome is Outcome.SAME
