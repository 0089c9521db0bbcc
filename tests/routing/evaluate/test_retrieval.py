"""Retrieval accuracy on embeddings whose answers are known."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from routing.evaluate.retrieval import (
    EmbeddedTask,
    TaskTexts,
    accuracy,
    by_task,
    cluster_confusion,
    mean_prototype,
    rank_tasks,
    raw_mean,
    retrieval_accuracy,
)
from routing.train.data import Task, TaskRow
from routing.train.pairs import BOTH, INPUT

AXES = np.eye(4, dtype=np.float32)


def vectors(*rows: tuple[float, ...]) -> np.ndarray:
    found = np.array(rows, dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def task(name: str, samples: np.ndarray, queries: np.ndarray, cluster: str = "c") -> EmbeddedTask:
    return EmbeddedTask(name, cluster, samples, queries)


def test_ranks_count_the_tasks_that_come_first() -> None:
    tasks = [
        task("a", AXES[:1], vectors((3, 2, 1, 0), (1, 2, 3, 0))),
        task("b", AXES[1:2], vectors((3, 2, 1, 0))),
        task("c", AXES[2:3], vectors((0, 0, 1, 0))),
    ]
    a, b, c = rank_tasks(tasks)
    assert (a.ranks().tolist(), b.ranks().tolist(), c.ranks().tolist()) == ([0, 2], [1], [0])
    assert accuracy([a, b, c], (1, 2, 3)) == {"queries": 4.0, "top1": 0.5, "top2": 0.75, "top3": 1.0}
    assert by_task([a, b, c]) == {"a": 0.5, "b": 0.0, "c": 1.0}


def test_equal_scores_everywhere_are_worth_nothing() -> None:
    tasks = [task(name, AXES[:1], AXES[:1]) for name in "abc"]
    assert retrieval_accuracy(tasks, ks=(1, 2, 3))["all"] == {"queries": 3.0, "top1": 0.0, "top2": 0.0, "top3": 1.0}


def test_seen_and_unseen_are_told_apart_among_all_candidates() -> None:
    tasks = [task("a", AXES[:1], AXES[:1]), task("b", AXES[1:2], AXES[:1]), task("c", AXES[2:3], AXES[2:3])]
    found = retrieval_accuracy(tasks, seen={"a", "b"}, ks=(1,))
    assert found == {
        "all": {"queries": 3.0, "top1": 0.66667},
        "seen": {"queries": 2.0, "top1": 0.5},
        "unseen": {"queries": 1.0, "top1": 1.0},
    }
    assert set(retrieval_accuracy(tasks, seen={"a", "b", "c"}, ks=(1,))) == {"all"}


def test_the_best_of_several_prototypes_counts() -> None:
    two = np.stack([AXES[0], AXES[3]])
    tasks = [task("a", two, AXES[3:4]), task("b", vectors((0, 0, 1, 1)), AXES[2:3])]
    assert retrieval_accuracy(tasks, prototypes=lambda samples: samples, ks=(1,))["all"]["top1"] == 1.0
    assert rank_tasks(tasks)[0].ranks().tolist() == [1], "the mean of two directions is near neither"


def test_a_raw_mean_favours_tasks_whose_samples_agree() -> None:
    spread = task("spread", vectors((1, 1, 0, 0), (1, -1, 0, 0)), vectors((1, 0, 0, 0.9)))
    tight = task("tight", AXES[3:4], AXES[3:4])
    assert rank_tasks([spread, tight], mean_prototype)[0].ranks().tolist() == [0]
    assert rank_tasks([spread, tight], raw_mean)[0].ranks().tolist() == [1]


def test_confusion_is_between_clusters() -> None:
    tasks = [
        task("a", AXES[:1], AXES[:2], "x"),
        task("b", AXES[1:2], AXES[:1], "x"),
        task("c", AXES[2:3], AXES[:4:2], "y"),
    ]
    names, shares = cluster_confusion(tasks, rank_tasks(tasks))
    assert names == ["x", "y"]
    assert shares.tolist() == [[1.0, 0.0], [0.5, 0.5]]


@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 1000))
def test_accuracy_grows_with_k_to_one(count: int, queries: int, seed: int) -> None:
    chance = np.random.default_rng(seed)
    tasks = [
        task(str(i), vectors(*chance.normal(size=(3, 5))), vectors(*chance.normal(size=(queries, 5))))
        for i in range(count)
    ]
    found = retrieval_accuracy(tasks, ks=tuple(range(1, count + 1)))["all"]
    shares = [found[f"top{k}"] for k in range(1, count + 1)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_texts_take_samples_from_training_rows_and_queries_from_the_split() -> None:
    def row(text: str) -> TaskRow:
        return TaskRow("t", "c", "Do", text, "x", 0)

    found = TaskTexts.of(
        Task("t", (row("1"), row("2"), row("3")), (row("v"),), (row("a"), row(""))), BOTH, "test", 2, 5
    )
    assert (found.samples, found.queries) == (("Do\n1", "Do\n2"), ("Do\na", "Do"))
    task = Task("t", (row("1"),), (row("v"),), (row("a"), row("")))
    assert TaskTexts.of(task, INPUT, "test", 1, 5).queries == ("a", "Do")
    assert TaskTexts.of(task, INPUT, "valid", 1, 5).queries == ("v",)
