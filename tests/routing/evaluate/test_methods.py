import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.registry import Resolved
from adapters_store.types import Composition, Mix
from routing.evaluate.methods import METHODS, Chosen, Setting, choose, settings, softmax_weights
from routing.evaluate.ranked import RankedQuery
from routing.router import RoutedAdapter, compose
from routing.train.data import TaskRow

NAMES = ("a", "b", "c", "d")


def query(task: str, *scores: float) -> RankedQuery:
    ranked = sorted(zip(NAMES, scores, strict=True), key=lambda pair: -pair[1])
    return RankedQuery(task, 0, TaskRow(task, "x", "i", "", "t", 0), ("t",), tuple(ranked))


QUERIES = [query("a", 0.9, 0.8, 0.1, 0.7), query("a", 0.2, 0.3, 0.6, 0.1), query("b", 0.5, 0.4, 0.3, 0.2)]


def names(chosen: list[Chosen]) -> list[str]:
    return ["".join(name for name, _ in own.entries) for own in chosen]


def test_settings_are_in_and_out_of_distribution() -> None:
    found = [setting.name for setting in settings()]
    assert found[:2] == ["oracle", "base"]
    assert found[2:] == [f"{method}/{side}" for method in METHODS[2:] for side in ("id", "ood")]


def test_own_adapter_is_no_candidate_out_of_distribution() -> None:
    assert names(choose(Setting("selection", True), QUERIES)) == ["a", "c", "a"]
    assert names(choose(Setting("selection", False), QUERIES)) == ["b", "c", "a"]
    assert names(choose(Setting("mixture", True), QUERIES)) == ["abd", "cba", "abc"]
    assert names(choose(Setting("mixture", False), QUERIES)) == ["bdc", "cbd", "acd"]
    for method in METHODS[2:]:
        for own, asked in zip(choose(Setting(method, False), QUERIES), QUERIES, strict=True):
            assert asked.task not in {name for name, _ in own.entries}
            assert math.fsum(weight for _, weight in own.entries) == pytest.approx(1)


def test_oracle_and_base() -> None:
    assert names(choose(Setting("oracle", True), QUERIES)) == ["a", "a", "b"]
    assert [own.mix({}) for own in choose(Setting("base", True), QUERIES)] == [Mix()] * 3


def test_a_soup_is_one_set_for_a_task() -> None:
    # mean scores of task a: a 0.55, b 0.55, c 0.35, d 0.4
    chosen = choose(Setting("soup", True), QUERIES, top_k=3)
    assert names(chosen) == ["abd", "abd", "abc"]
    assert names(choose(Setting("soup", False), QUERIES, top_k=2)) == ["bd", "bd", "ac"]
    assert {own.composition for own in chosen} == {Composition.FUSION}


def test_mixes_are_those_that_a_server_makes() -> None:
    """The router's own composition of the same entries gives the same mix."""
    digests = {name: name * 64 for name in NAMES}
    for method in ("selection", "fusion", "mixture"):
        for own, asked in zip(choose(Setting(method, True), QUERIES), QUERIES, strict=True):
            entries = [
                RoutedAdapter(Resolved("t", name, digests[name], True, "", ""), 1 / 3, score)
                for name, score in asked.ranked[:3]
            ]
            kind = Composition(method)
            served = Mix.of([(e.digest, e.weight) for e in compose(entries, kind)], kind)
            assert own.mix(digests).digests == served.digests
            assert own.mix(digests).composition == served.composition
            assert [weight for _, weight in own.mix(digests).entries] == pytest.approx(
                [weight for _, weight in served.entries]
            )


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=40),
    st.floats(0.01, 10),
)
def test_softmax_weights_are_in_units_and_sum_to_one(scores: list[float], temperature: float) -> None:
    ranked = [(str(place), score) for place, score in enumerate(scores)]
    found = dict(softmax_weights(ranked, temperature))
    assert sum(found.values()) == 1
    assert all(weight > 0 and (32 * weight).is_integer() for weight in found.values())
    total = math.fsum(math.exp(score / temperature - max(scores) / temperature) for score in scores)
    for name, score in ranked:
        exact = math.exp(score / temperature - max(scores) / temperature) / total
        assert abs(found.get(name, 0.0) - exact) < 1 / 32 + 1e-9


def test_softmax_of_equal_scores_is_even() -> None:
    assert softmax_weights([("a", 0.5), ("b", 0.5)], 0.1) == (("a", 0.5), ("b", 0.5))
    assert softmax_weights([("a", 5.0), ("b", 0.5)], 0.01) == (("a", 1.0),)
    thirds = dict(softmax_weights([("a", 0.0), ("b", 0.0), ("c", 0.0)], 1.0))
    assert thirds == {"a": 11 / 32, "b": 11 / 32, "c": 10 / 32}


def test_without_candidates() -> None:
    alone = RankedQuery("a", 7, QUERIES[0].example, ("t",), (("a", 0.5),))
    with pytest.raises(ValueError, match="task a, row 7: no adapter is left"):
        choose(Setting("selection", False), [alone])
