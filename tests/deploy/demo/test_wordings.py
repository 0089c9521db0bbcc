"""The demo's tasks in other wordings."""

from collections import Counter
from pathlib import Path

import pytest

from deploy.demo import wordings
from deploy.demo.tasks import SEED, TASKS, generate
from routing.train.data import read_tasks


@pytest.mark.parametrize("name", TASKS)
def test_only_the_wording_of_later_test_rows_is_another(name: str) -> None:
    task = generate(name, SEED, wordings.SIZES)
    found = wordings.asked_otherwise(task)
    assert (found.train, found.valid, found.test[: wordings.KNOWN]) == (
        task.train,
        task.valid,
        task.test[: wordings.KNOWN],
    )
    for row, own in zip(found.test, task.test, strict=True):
        assert (row.task, row.input, row.target) == (own.task, own.input, own.target)
    others = found.test[wordings.KNOWN :]
    assert Counter(row.template for row in others) == dict.fromkeys((3, 4, 5, 6), 7)
    assert {row.instruction for row in others} == set(wordings.OTHERS[name])


def test_no_wording_is_known_or_comes_twice() -> None:
    known = [wording for spec in TASKS.values() for wording in spec.instructions]
    others = [wording for name in TASKS for wording in wordings.OTHERS[name]]
    assert len(set(known + others)) == len(known) + len(others)


def test_they_are_written_as_task_folders(tmp_path: Path) -> None:
    assert wordings.main(["--out", str(tmp_path)]) == 0
    found = {task.name: task for task in read_tasks(tmp_path)}
    assert found == {name: wordings.asked_otherwise(generate(name, SEED, wordings.SIZES)) for name in TASKS}
