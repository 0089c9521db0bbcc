"""Writes the rows of several tasks as one, on which `routing.train.many` trains one adapter for all of them:

python -m routing.train.joint --tasks ROOT --group small --out DIR
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

from routing.train.data import Task, TaskDataError, TaskRow, read_task, write_task
from routing.train.many import task_names

NAME = "joint"
HELD_OUT = 10
"""Validation and test rows of each task: the joint task is not judged by them all."""


def joint_task(tasks: Sequence[Task], rows: int | None = None, seed: int = 0) -> Task:
    """One task of the tasks' rows, at most `rows` training rows of each, in an order that mixes them evenly.

    A prompt that is a training row of one task and held out of another is trained on and not held out.
    """

    def mixed(parts: Sequence[Sequence[TaskRow]]) -> tuple[TaskRow, ...]:
        shuffled = [random.Random(f"{seed}/{number}").sample(part, len(part)) for number, part in enumerate(parts)]
        return tuple(row for row in chain.from_iterable(zip_longest(*shuffled)) if row is not None)

    train = mixed([task.train[:rows] for task in tasks])
    seen = {row.prompt for row in train}
    valid, test = (
        tuple(row for row in mixed([getattr(task, split)[:HELD_OUT] for task in tasks]) if row.prompt not in seen)
        for split in ("valid", "test")
    )
    return Task(NAME, train, valid, test)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Prints the task's folder. Exit code 0 done, 2 the tasks cannot be read."""
    asked = _parser().parse_args(arguments)
    try:
        tasks = [read_task(asked.tasks / name) for name in task_names(asked.tasks, asked.group)]
    except TaskDataError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{write_task(asked.out, joint_task(tasks, asked.rows, asked.seed))}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").split(":")[0]
    parser = argparse.ArgumentParser(prog="python -m routing.train.joint", description=about)
    parser.add_argument("--tasks", type=Path, required=True, help="folder of task folders")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the task folder joint")
    parser.add_argument("--group", help="of manifest.json [all tasks]")
    parser.add_argument("--rows", type=int, help="training rows of each task at most [all]")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
