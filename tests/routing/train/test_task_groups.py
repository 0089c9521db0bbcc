import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from routing.train.task_groups import activation_bytes, row_token_budget, task_groups


def test_groups_are_of_similar_length_and_the_shortest_come_first() -> None:
    longest = {"a": 50, "b": 180, "c": 40, "d": 170, "e": 45}
    assert task_groups(longest, 2, float("inf")) == [["c"], ["e", "a"], ["d", "b"]]
    assert task_groups(longest, 9, 400) == [["c", "e", "a"], ["d", "b"]]
    assert task_groups(longest, 9, 10) == [["c"], ["e"], ["a"], ["d"], ["b"]]


@given(st.dictionaries(st.text(), st.integers(1, 600)), st.integers(1, 20), st.integers(1, 5000))
def test_every_task_is_in_one_group_within_the_limits(longest: dict[str, int], most: int, budget: int) -> None:
    groups = task_groups(longest, most, budget)
    flat = [name for group in groups for name in group]
    assert sorted(flat) == sorted(longest)
    assert [longest[name] for name in flat] == sorted(longest.values())
    for group in groups:
        assert 1 <= len(group) <= most
        assert len(group) == 1 or len(group) * max(longest[name] for name in group) <= budget


def test_activations_grow_with_the_model() -> None:
    small = LlamaConfig(num_hidden_layers=30, hidden_size=576, intermediate_size=1536)
    assert activation_bytes(small) == 783_360
    assert row_token_budget(small, torch.device("cpu"), 32) == float("inf")
