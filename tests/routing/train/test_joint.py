"""Several tasks as one: every row is there, evenly mixed, and nothing that is held out is trained on."""

from collections import Counter
from pathlib import Path

import pytest
from meteora_world import toy_task

from routing.train.data import Task, read_task, write_task
from routing.train.joint import joint_task, main

TASKS = [toy_task("ab", "ab", rows=40), toy_task("xyz", "xyz", rows=24)]


def test_all_rows_are_there_and_begin_evenly() -> None:
    joint = joint_task(TASKS, seed=3)
    assert Counter(joint.train) == Counter(row for task in TASKS for row in task.train)
    first = [row.task for row in joint.train[:40]]
    assert abs(first.count("ab") - first.count("xyz")) <= 1
    assert joint.train != joint_task(TASKS, seed=4).train
    assert Counter(row.task for row in joint_task(TASKS, rows=5).train) == {"ab": 5, "xyz": 5}


def test_what_one_task_trains_on_is_not_held_out_of_another() -> None:
    other = Task("cd", TASKS[0].test, TASKS[0].train[:1], TASKS[1].test)
    joint = joint_task([TASKS[0], other])
    seen = {row.prompt for row in joint.train}
    assert not seen & {row.prompt for row in (*joint.valid, *joint.test)}
    assert joint.test


def test_it_is_written_as_a_task_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, letters in {"ab": "ab", "xyz": "xyz"}.items():
        write_task(tmp_path / "tasks", toy_task(name, letters))
    assert main(["--tasks", str(tmp_path / "tasks"), "--out", str(tmp_path / "out"), "--rows", "6"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'joint'}\n"
    assert len(read_task(tmp_path / "out" / "joint").train) == 12
    assert main(["--tasks", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "expected folders" in capsys.readouterr().err
