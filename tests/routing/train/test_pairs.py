"""Pairs of the same task, drawn again and again in the same way."""

from hypothesis import given
from hypothesis import strategies as st

from routing.train.data import TaskRow
from routing.train.pairs import BOTH, INPUT, MIXED, batch_pairs, text_of, trained_tasks


def rows(task: int, count: int) -> list[TaskRow]:
    return [TaskRow(str(task), "c", f"instruction {task}", f"{task}/{i}", "x", 0) for i in range(count)]


def owner(text: str) -> str:
    return text.splitlines()[-1].partition("/")[0]


@given(st.integers(2, 6), st.integers(1, 8), st.integers(1, 5), st.integers(1, 4), st.integers(0, 50))
def test_pairs_are_of_one_task_and_tasks_do_not_repeat(
    count: int, tasks: int, each: int, support: int, step: int
) -> None:
    pools = [rows(task, each) for task in range(count)]
    batch = batch_pairs(pools, tasks, support, INPUT, step, 0)
    owners = [owner(anchor) for anchor in batch.anchors]
    assert len(owners) == len(set(owners)) == min(tasks, count)
    assert len({len(samples) for samples in batch.positives}) == 1
    for anchor, samples in zip(batch.anchors, batch.positives, strict=True):
        assert {owner(sample) for sample in samples} == {owner(anchor)}
        assert anchor not in samples or each == 1
    assert batch == batch_pairs(pools, tasks, support, INPUT, step, 0)


def test_tasks_of_different_sizes_have_positives_of_one_size() -> None:
    batch = batch_pairs([rows(0, 2), rows(1, 9)], 2, 4, INPUT, 0, 0)
    assert {len(samples) for samples in batch.positives} == {4}


def test_steps_and_seeds_differ() -> None:
    pools = [rows(task, 50) for task in range(3)]
    drawn = {batch_pairs(pools, 3, 1, INPUT, step, seed).anchors for step in range(5) for seed in range(3)}
    assert len(drawn) == 15


def test_mixed_draws_each_side_by_itself_and_the_whole_side_alike() -> None:
    pools = [rows(task, 5) for task in range(3)]
    kinds = set()
    for step in range(40):
        batch = batch_pairs(pools, 3, 2, MIXED, step, 0)
        asked = {"\n" in anchor for anchor in batch.anchors}
        stored = {"\n" in sample for samples in batch.positives for sample in samples}
        assert len(asked) == len(stored) == 1
        kinds.add((asked.pop(), stored.pop()))
    assert len(kinds) == 4


def test_a_row_without_input_is_its_instruction() -> None:
    row = TaskRow("t", "c", "Do it", "", "x", 0)
    assert text_of(row, INPUT) == text_of(row, BOTH) == "Do it"


def test_a_share_of_the_tasks_is_chosen_by_the_seed() -> None:
    names = [f"t{i}" for i in range(36)]
    first = trained_tasks(names, 0.4, 0)
    assert len(first) == 14
    assert first == trained_tasks(names[::-1], 0.4, 0) == sorted(first)
    assert first != trained_tasks(names, 0.4, 1)
    assert trained_tasks(names, 0.0, 0) == []
    assert trained_tasks(names, 1.0, 0) == sorted(names)
