"""What each tenant sees of the registry: its own adapters, the public ones, lists and resolved names."""

from dataclasses import replace

import pytest

from adapters_store.registry import NameTaken, NotFound, Registry
from tests.adapters_store.registered import adapter, names_of


class TestVisibility:
    def test_a_tenant_sees_its_own_and_the_public(self, registry: Registry) -> None:
        registry.register("acme", "private", adapter("a"))
        registry.register("acme", "shared", adapter("b"), public=True)
        registry.register("umbrella", "mine", adapter("c"))
        assert names_of(registry, "umbrella") == [("umbrella", "mine"), ("acme", "shared")]
        assert names_of(registry, "umbrella", own=True) == [("umbrella", "mine")]
        assert registry.get("umbrella", "shared").tenant == "acme"
        with pytest.raises(NotFound, match="adapter 'private' does not exist") as refused:
            registry.get("umbrella", "private")
        assert refused.value.status == 404
        assert set(registry.resolve("umbrella", ["private", "shared", "mine", "none"])) == {"shared", "mine"}

    def test_nobody_changes_what_belongs_to_another(self, registry: Registry) -> None:
        registry.register("acme", "shared", adapter("b"), public=True)
        for change in (registry.update, registry.removals.mark, registry.removals.remove):
            with pytest.raises(NotFound):
                change("umbrella", "shared")
        assert registry.samples("umbrella", ["shared"]) == {}
        assert registry.get("acme", "shared").public

    def test_an_own_name_hides_a_public_one(self, registry: Registry) -> None:
        registry.register("acme", "sql", adapter("a"), public=True)
        registry.register("umbrella", "sql", adapter("b"))
        assert names_of(registry, "umbrella") == [("umbrella", "sql")]
        assert registry.get("umbrella", "sql").adapter.digest == "b" * 64
        assert registry.resolve("umbrella", ["sql"])["sql"].digest == "b" * 64
        assert "sql@aaaa" not in registry.resolve("umbrella", ["sql@aaaa"])
        registry.removals.mark("umbrella", "sql")
        assert names_of(registry, "umbrella") == [("acme", "sql")]
        assert registry.get("umbrella", "sql").adapter.digest == "a" * 64
        assert registry.resolve("umbrella", ["sql"])["sql"].tenant == "acme"

    def test_a_public_name_exists_once(self, registry: Registry) -> None:
        registry.register("acme", "sql", adapter("a"), public=True)
        with pytest.raises(NameTaken, match="a public adapter 'sql' exists"):
            registry.register("umbrella", "sql", adapter("b"), public=True)
        registry.register("umbrella", "sql", adapter("b"))
        with pytest.raises(NameTaken, match="a public adapter 'sql' exists"):
            registry.update("umbrella", "sql", public=True, description="not stored")
        with pytest.raises(NameTaken, match="a public adapter 'sql' exists"):
            registry.register("umbrella", "sql", adapter("c"), public=True, replace=True)
        kept = registry.get("umbrella", "sql")
        assert (kept.public, kept.description, len(kept.revisions)) == (False, "", 1)

    def test_update_changes_only_what_is_given(self, registry: Registry) -> None:
        first = registry.register("acme", "sql", adapter("a"), tags=["x"], samples=["s"], description="d").adapter
        assert registry.update("acme", "sql", pinned=True) == replace(first, pinned=True)
        assert registry.update("acme", "sql", tags=[], pinned=False) == replace(first, tags=())
        registry.update("acme", "sql", samples=["t", "u"])
        assert registry.samples("acme", ["sql"]) == {"sql": ("t", "u")}


class TestLists:
    def test_pages_cover_everything_once_in_order(self, registry: Registry) -> None:
        for index, name in enumerate(["b", "B", "a.1", "a-1", "a_1", "Z", "0"]):
            registry.register("acme" if index % 2 else "umbrella", name, adapter("a"), public=index % 2 == 1)
        seen: list[str] = []
        cursor = None
        while True:
            page = registry.list("umbrella", limit=2, cursor=cursor)
            seen += [each.name for each in page.items]
            assert len(page.items) <= 2
            if page.next is None:
                break
            cursor = page.next
        assert seen == ["0", "B", "Z", "a-1", "a.1", "a_1", "b"]
        assert registry.list("umbrella", limit=7).next is None

    def test_filter_by_tag(self, registry: Registry) -> None:
        registry.register("acme", "one", adapter("a"), tags=["code", "sql"])
        registry.register("acme", "two", adapter("a"), tags=["sqlite"], public=True)
        registry.register("acme", "three", adapter("a"), tags=["sql"], public=True)
        assert names_of(registry, "acme", tag="sql") == [("acme", "one"), ("acme", "three")]
        assert names_of(registry, "umbrella", tag="sql") == [("acme", "three")]
        assert names_of(registry, "acme", tag="SQL") == []

    def test_resolve_means_what_get_means(self, registry: Registry) -> None:
        registry.register("acme", "sql", adapter("a"), public=True)
        registry.register("acme", "sql", adapter("b"), replace=True)
        registry.register("umbrella", "near", replace(adapter("c"), digest="cccc1" + "c" * 59))
        registry.register("umbrella", "near", replace(adapter("c"), digest="cccc2" + "c" * 59), replace=True)
        wanted = [
            "sql",
            "sql@aaaa",
            "sql@" + "B" * 64,
            "sql@bbb",
            "sql@cccc",
            "near@cccc",
            "near@cccc1",
            "near@",
            "no@aaaa",
        ]
        found = registry.resolve("umbrella", wanted)
        assert {each: found[each].digest[:5] for each in found} == {
            "sql": "bbbbb",
            "sql@" + "B" * 64: "bbbbb",
            "near@cccc1": "cccc1",
        }
        assert (found["sql"].tenant, found["sql"].name, found["sql"].public) == ("acme", "sql", True)
        assert registry.resolve("umbrella", ["sql"])["sql"] == found["sql"]
        assert registry.resolve("acme", ["sql@aaaa"])["sql@aaaa"].weights_blob == adapter("a").weights_blob

    def test_what_a_public_name_was_before_remains_its_owners(self, registry: Registry) -> None:
        registry.register("acme", "sql", adapter("a"))
        registry.register("acme", "sql", adapter("b"), replace=True)
        registry.update("acme", "sql", public=True)
        assert set(registry.resolve("acme", ["sql@aaaa", "sql@bbbb"])) == {"sql@aaaa", "sql@bbbb"}
        assert set(registry.resolve("umbrella", ["sql@aaaa", "sql@bbbb"])) == {"sql@bbbb"}
        assert [each.digest[0] for each in registry.get("acme", "sql").revisions] == ["a", "b"]
        assert [each.digest[0] for each in registry.get("umbrella", "sql").revisions] == ["b"]
        (listed,) = registry.list("umbrella").items
        assert (listed, listed.revisions[0].number) == (registry.get("umbrella", "sql"), 2)

    @pytest.mark.parametrize("count", [10_000, pytest.param(70_000, marks=pytest.mark.slow)])
    def test_resolving_more_names_than_one_statement_takes(self, registry: Registry, count: int) -> None:
        """PostgreSQL takes 65,535 parameters; the registry stays far below in each of its statements."""
        registry.register("acme", "a", adapter("a"))
        registry.register("acme", "z", adapter("b"))
        assert set(registry.resolve("acme", ["z", *(f"n{index}" for index in range(count)), "a"])) == {"a", "z"}

    def test_models_are_what_the_list_has(self, registry: Registry) -> None:
        for index, name in enumerate(("b", "a", "c", "d")):
            registry.register("acme" if index % 2 else "umbrella", name, adapter("abcd"[index]), public=index < 2)
        registry.register("acme", "b", adapter("e"))
        registry.removals.mark("acme", "d")
        for tenant in ("acme", "umbrella", "default"):
            listed = registry.list(tenant).items
            models = registry.models(tenant)
            assert models.next is None
            assert [(row.tenant, row.name, row.digest, row.public, row.created) for row in models.items] == [
                (each.tenant, each.name, each.adapter.digest, each.public, each.created) for each in listed
            ]
        first = registry.models("acme", limit=1)
        assert ([row.name for row in first.items], first.next) == (["a"], "a")
        assert [(row.tenant, row.name) for row in registry.models("acme", limit=5, cursor="a").items] == [("acme", "b")]

    def test_a_recipe_stays_with_its_revision(self, registry: Registry) -> None:
        recipe = {"method": "cat", "adapters": [{"name": "x", "weight": 0.5}], "rank": None}
        registry.register("acme", "sql", adapter("a"))
        registry.register("acme", "sql", adapter("b"), recipe=recipe, replace=True)
        registry.register("umbrella", "copy", adapter("b"))
        assert registry.get("acme", "sql").recipe == recipe
        assert [each.recipe for each in registry.get("acme", "sql").revisions] == [None, recipe]
        assert registry.get("umbrella", "copy").recipe is None
        assert registry.roll_back("acme", "sql", "a" * 64).recipe is None
