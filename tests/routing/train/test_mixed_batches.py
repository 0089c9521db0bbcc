"""Batches of several tasks: balanced, a function of seed and step, and every token knows its task."""

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.train.batches import Example
from routing.train.mixed_batches import Mixture, collate_mixed


def pool(task: int, count: int) -> list[Example]:
    return [Example((task, row, 50, 60), 2) for row in range(count)]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(1, 7),
    st.integers(0, 9),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_tasks_are_balanced_and_steps_do_not_depend_on_earlier_ones(
    counts: list[int], batch: int, seed: int, packed: float
) -> None:
    tasks = [pool(task, count) for task, count in enumerate(counts)]
    mixture = Mixture(tasks, batch, seed, packed, max_length=9)
    found = [mixture.samples(step) for step in range(12)]
    for step in (11, 3, 7):
        assert Mixture(tasks, batch, seed, packed, max_length=9).samples(step) == found[step] == mixture.samples(step)
    samples = [sample for step in found for sample in step]
    assert len(samples) == 12 * batch
    firsts = [sample[0] for sample in samples]
    drawn = Counter(task for task, _ in firsts)
    assert max(drawn.values()) - min(drawn[task] for task in range(len(counts))) <= 1
    for task, count in enumerate(counts):  # each epoch takes every row once
        rows = [example.ids[1] for owner, example in firsts if owner == task]
        for epoch in range(len(rows) // count):
            assert sorted(rows[epoch * count : (epoch + 1) * count]) == list(range(count))
    for sample in samples:
        owners = [task for task, _ in sample]
        assert len(set(owners)) == len(owners) <= 2  # a third row of four tokens would be too long
        assert all(example in tasks[task] for task, example in sample)
    if packed in (0.0, 1.0) and len(counts) > 1:
        assert all(len(sample) == 1 + packed for sample in samples)


def test_packs_have_two_or_three_rows() -> None:
    mixture = Mixture([pool(task, 5) for task in range(4)], 30, 0, packed=1.0)
    lengths = Counter(len(sample) for sample in mixture.samples(0))
    assert lengths.keys() == {2, 3}


def test_tasks_of_equal_length_go_through_their_rows_in_different_orders() -> None:
    mixture = Mixture([pool(task, 20) for task in range(3)], 60, 0)
    rows = [[example.ids[1] for ((owner, example),) in mixture.samples(0) if owner == task] for task in range(3)]
    assert [sorted(order) for order in rows] == [list(range(20))] * 3
    assert len({tuple(order) for order in rows}) == 3


def test_a_partner_that_does_not_fit_makes_room_for_others() -> None:
    long = [Example(tuple(range(20)), 2)]
    mixture = Mixture([pool(0, 5), long, pool(2, 5), long, long], 100, 0, packed=1.0, max_length=9)
    found = [sample for sample in mixture.samples(0) if sample[0][0] == 0]
    assert len(found) == 20
    assert all([task for task, _ in sample] == [0, 2] for sample in found)
    alone = Mixture([pool(0, 5), long], 4, 0, packed=1.0, max_length=9)
    assert [len(sample) for sample in alone.samples(0)] == [1] * 4


def test_the_share_of_packs_is_as_asked_for() -> None:
    mixture = Mixture([pool(task, 5) for task in range(4)], 2000, 0, packed=0.3)
    assert 0.27 < sum(len(sample) > 1 for sample in mixture.samples(0)) / 2000 < 0.33


def test_collating_labels_every_token() -> None:
    one, two = Example((1, 2, 3, 4), 2), Example((5, 6, 7), 1)
    batch = collate_mixed([((0, one), (3, two)), ((2, two),)], 9, torch.device("cpu"))
    no = -100
    assert batch.ids.tolist() == [[1, 2, 3, 4, 5, 6, 7], [5, 6, 7, 9, 9, 9, 9]]
    assert batch.mask.tolist() == [[1] * 7, [1, 1, 1, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[no, no, 3, 4, no, no, 7], [no, no, 7, no, no, no, no]]
    assert batch.tasks.tolist() == [[0] * 4 + [3] * 3, [2] * 3 + [no] * 4]
    assert [row.nonzero().flatten().tolist() for row in batch.answers] == [[1, 2, 5], [1]]
    whole = collate_mixed([((0, one), (3, two))], 9, torch.device("cpu"), prompts_count=True)
    assert whole.labels.tolist() == [[no, 2, 3, 4, no, 6, 7]]
    assert torch.equal(whole.answers, batch.answers[:1])
