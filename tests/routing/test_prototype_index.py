"""The index against a search through everything, with any history of puts, removals and changes of who may see."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from routing.prototype_index import Hit, PrototypeIndex
from routing.prototype_rows import PrototypeRows
from tests.routing.prototype_world import unit

WIDTH = 4
TENANTS = ["t", "u", "v"]
NAMES = ["a", "b", "c", "d"]
Adapters = dict[tuple[str, str], tuple[bool, np.ndarray]]


def drawn(seed: int, count: int) -> np.ndarray:
    """Few different vectors, so that many tie."""
    rng = np.random.default_rng(seed % 7)
    return np.stack([unit(*rng.standard_normal(WIDTH)) for _ in range(count)])


def naive(adapters: Adapters, tenant: str, query: np.ndarray, candidates: list[str] | None) -> list[Hit]:
    hits = []
    for (owner, name), (public, vectors) in adapters.items():
        seen = owner == tenant or (public and (tenant, name) not in adapters)
        if seen and (candidates is None or name in candidates):
            hits.append(Hit(owner, name, round(max(float(vector @ query) for vector in vectors), 6)))
    return sorted(hits, key=lambda hit: (-hit.score, hit.owner, hit.name))


def same(found: list[Hit], expected: list[Hit]) -> None:
    """Equal up to the rounding of a score, and to the order of scores that differ by no more."""
    assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], abs=3e-6)
    assert len(set(found)) == len(found)
    near = {(hit.owner, hit.name): hit.score for hit in expected}
    for hit in found:
        if (hit.owner, hit.name) in near:
            assert hit.score == pytest.approx(near[hit.owner, hit.name], abs=3e-6)
        else:
            assert hit.score == pytest.approx(expected[-1].score, abs=3e-6)


class IndexMachine(RuleBasedStateMachine):
    tenants = st.sampled_from(TENANTS)
    names = st.sampled_from(NAMES)
    seeds = st.integers(0, 100)

    @initialize()
    def start(self) -> None:
        self.index = PrototypeIndex(WIDTH)
        self.model: Adapters = {}

    @rule(tenant=tenants, name=names, public=st.booleans(), seed=seeds, count=st.integers(1, 4))
    def put(self, tenant: str, name: str, public: bool, seed: int, count: int) -> None:
        before = {each: self.index.version(each) for each in TENANTS}
        vectors = drawn(seed, count)
        was_public = self.model.get((tenant, name), (False,))[0]
        self.index.put(tenant, name, public, vectors)
        self.model[tenant, name] = (public, vectors)
        changed = {each for each in TENANTS if self.index.version(each) != before[each]}
        assert changed == (set(TENANTS) if public or was_public else {tenant})

    @rule(tenant=tenants, name=names)
    def remove(self, tenant: str, name: str) -> None:
        assert self.index.remove(tenant, name) == ((tenant, name) in self.model)
        self.model.pop((tenant, name), None)

    @rule(tenant=tenants, seed=seeds, k=st.integers(1, 6), candidates=st.none() | st.lists(names))
    def search(self, tenant: str, seed: int, k: int, candidates: list[str] | None) -> None:
        query = drawn(seed, 1)[0]
        expected = naive(self.model, tenant, query, candidates)
        found = self.index.search(tenant, query, candidates)
        same(found, expected)
        assert {hit[:2] for hit in found} == {hit[:2] for hit in expected}
        assert self.index.top(tenant, query, k, candidates) == found[:k]
        assert bool(self.index.count(tenant, candidates)) == bool(expected)

    @invariant()
    def it_is_whole(self) -> None:
        self.index.check_integrity()
        assert set(self.index) == set(self.model)
        assert len(self.index) == len(self.model)


class TestHistories(IndexMachine.TestCase):
    settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(0, 300), st.booleans(), st.integers(1, 4)), max_size=300),
    st.integers(1, 40),
    st.integers(0, 100),
)
def test_many_adapters(adapters: list[tuple[str, int, bool, int]], k: int, seed: int) -> None:
    index, model = PrototypeIndex(WIDTH), Adapters()
    rng = np.random.default_rng(seed)
    for tenant, number, public, count in adapters:
        vectors = np.stack([unit(*rng.standard_normal(WIDTH)) for _ in range(count)])
        index.put(tenant, f"n{number}", public, vectors)
        model[tenant, f"n{number}"] = (public, vectors)
    query = unit(*rng.standard_normal(WIDTH))
    for tenant in TENANTS:
        same(index.top(tenant, query, k), naive(model, tenant, query, None)[:k])
    for tenant, number, _, _ in adapters[::2]:
        index.remove(tenant, f"n{number}")
        model.pop((tenant, f"n{number}"), None)
    index.check_integrity()
    for tenant in TENANTS:
        same(index.search(tenant, query), naive(model, tenant, query, None))


def test_only_what_a_tenant_may_see_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    index = PrototypeIndex(2)
    index.put("other", "secret", False, unit(1, 0)[None])
    index.put("default", "shared", True, unit(0, 1)[None])
    index.put("t", "own", False, unit(1, 1)[None])
    seen: list[list[tuple[str, str]]] = []
    scores = PrototypeRows.scores

    def watched(rows: PrototypeRows, query: np.ndarray) -> np.ndarray:
        seen.append(list(rows.keys))
        return scores(rows, query)

    monkeypatch.setattr(PrototypeRows, "scores", watched)
    assert [hit.name for hit in index.top("t", unit(1, 0), 5)] == ["own", "shared"]
    assert sorted(key for keys in seen for key in keys) == [("default", "shared"), ("t", "own")]


def test_hidden_names_do_not_take_places_of_others() -> None:
    index = PrototypeIndex(2)
    for number in range(100):
        index.put("default", f"n{number:03}", True, unit(1, 0)[None])
        if number < 99:
            index.put("t", f"n{number:03}", False, unit(0, 1)[None])
    assert index.top("t", unit(1, 0), 1) == [Hit("default", "n099", 1.0)]
    assert [hit.name for hit in index.top("t", unit(1, 0), 3)] == ["n099", "n000", "n001"]


@pytest.mark.parametrize(
    "vectors",
    [np.ones((1, 3)), np.ones((0, 2)), np.ones(2), np.array([[np.nan, 1.0]]), np.array([[np.inf, 1.0]])],
)
def test_vectors_that_do_not_fit_are_refused(vectors: np.ndarray) -> None:
    index = PrototypeIndex(2)
    index.put("t", "a", False, unit(1, 0)[None])
    with pytest.raises(ValueError, match="prototypes of 'a' are"):
        index.put("t", "a", True, vectors.astype(np.float32))
    assert index.search("t", unit(1, 0)) == [Hit("t", "a", 1.0)]
    index.check_integrity()


def test_memory_is_given_back() -> None:
    rows = PrototypeRows(2, 4)
    for number in range(1000):
        rows.put(("t", str(number)), np.full((2, 4), number, np.float32))
    for number in range(990):
        rows.remove(("t", str(number)))
    rows.check_integrity()
    assert len(rows._matrix) <= 64
    assert all(rows.get(("t", str(number)))[1, 3] == number for number in range(990, 1000))
