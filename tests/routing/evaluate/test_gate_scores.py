"""Scores of methods: means, intervals and differences, against figures worked out by hand."""

from typing import Any

import pytest

from routing.evaluate.gate_scores import Lines, apart, composite_scores, task_scores


def rows(*scores: tuple[str, float], share: float | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"task": task, "row": row, "score": score, "em": float(score == 1)} for row, (task, score) in enumerate(scores)
    ]
    return found if share is None else [{**line, "share": share} for line in found]


ORACLE = rows(("a", 1.0), ("a", 1.0), ("b", 0.5))
GATES = rows(("a", 1.0), ("a", 0.0), ("b", 0.25), share=0.75)


def test_means_are_over_tasks_and_differences_are_paired() -> None:
    found = task_scores({"oracle": ORACLE, "gates": GATES}, seed=0)
    assert found["oracle"]["mean"] == pytest.approx(0.75)
    assert found["oracle"]["above_oracle"] is None
    assert found["oracle"]["share"] is None
    gates = found["gates"]
    assert gates["mean"] == pytest.approx(0.375)
    assert gates["exact_match"] == pytest.approx(0.25)
    assert gates["tasks"] == {"a": 0.5, "b": 0.25}
    assert gates["share"] == pytest.approx(0.75)
    assert gates["above_oracle"]["mean"] == pytest.approx(-0.375)
    low, high = gates["above_oracle"]["interval"]  # of task a none, one or both rows are the wrong one
    assert (low, high) == pytest.approx((-0.625, -0.125))
    assert gates["interval"] == pytest.approx([0.125, 0.625])
    assert apart(found, "b")["gates"] == {"own": 0.25, "others": 0.5}


def test_rows_are_counted_by_their_wording() -> None:
    lines = [{**line, "wording": wording} for line, wording in zip(ORACLE, (3, 0, 3), strict=True)]
    found = task_scores({"oracle": lines, "gates": GATES}, seed=0)
    assert list(found["oracle"]["wordings"].items()) == [("0", 1.0), ("3", 0.75)]
    assert found["gates"]["wordings"] == {}


def test_all_methods_are_compared_with_one() -> None:
    found = task_scores({"oracle": ORACLE, "gates": GATES, "other": GATES}, seed=0, beside="gates")
    assert found["oracle"]["above"]["mean"] == pytest.approx(0.375)
    assert found["oracle"]["above"]["interval"] == pytest.approx([0.125, 0.625])
    assert found["other"]["above"] == {"mean": 0.0, "interval": [0.0, 0.0]}
    assert "above" not in found["gates"]


def test_one_task_has_no_others() -> None:
    found = apart(task_scores({"base": rows(("a", 1.0))}, seed=0), "a")
    assert found == {"base": {"own": 1.0, "others": None}}
    assert task_scores({}, seed=0) == {}


def test_attempts_and_right_answers_are_means_over_prompts() -> None:
    lines = [
        {"tasks": ["a", "b"], "attempts": 2, "correct": 1.0, "em": [1.0, 0.0]},
        {"tasks": ["a", "b"], "attempts": 1, "correct": 0.0, "em": [0.0, 0.0]},
    ]
    found = composite_scores({"gates": lines}, seed=0)["gates"]
    assert (found["attempts"], found["correct"], found["prompts"]) == (1.5, 0.5, 2)
    assert (found["attempts_interval"], found["correct_interval"]) == ([1.0, 2.0], [0.0, 1.0])
    assert found["tasks"] == {"a": 0.5, "b": 0.0}


def test_lines_keep_the_order_of_the_methods() -> None:
    lines = Lines(["oracle", "gates"])
    lines.add("tasks", "gates", GATES)
    lines.add("tasks", "oracle", ORACLE)
    assert list(lines.tasks) == ["oracle", "gates"]
    assert lines.shown("tasks", "gates") == "37.5 %"
    lines.add("composite-2", "gates", [{"tasks": ["a", "b"], "attempts": 2, "correct": 1.0, "em": [1.0, 0.0]}])
    assert lines.shown("composite-2", "gates") == "2.00 attempts, 1.00 correct of 2"
