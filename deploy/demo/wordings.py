"""The demo's tasks with test rows in wordings that no training row has: `python -m deploy.demo.wordings --out DIR`.

What routers make of them is in docs/results.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from deploy.demo.tasks import SEED, TASKS, generate
from routing.train.data import Task, write_task

SIZES = MappingProxyType({"train": 400, "valid": 8, "test": 40})
KNOWN = 12
"""Test rows of each task that keep a wording of the training rows; all others take turns with the four others."""

OTHERS: Mapping[str, tuple[str, str, str, str]] = MappingProxyType(
    {
        "spell": (
            "List its letters.",
            "What are the letters of this?",
            "Write the word letter by letter.",
            "Letters, please:",
        ),
        "json_fields": (
            "Make a JSON record of this person.",
            "Return name and so on, machine-readable.",
            "Who is it? Answer in JSON.",
            "Structure this:",
        ),
        "sort_numbers": (
            "Arrange them by size.",
            "Rank the values, lowest first.",
            "Sort ascending.",
            "Which is smallest, which next?",
        ),
        "pirate": (
            "Talk as a buccaneer would.",
            "Make it sound like the high seas.",
            "Pirate version, please:",
            "Translate for Captain Hook.",
        ),
        "number_words": (
            "How is this figure read aloud?",
            "Verbalise it.",
            "Convert digits to words.",
            "Put this amount into letters.",
        ),
        "iso_date": (
            "Normalise this day.",
            "Rewrite as a calendar date for machines.",
            "When is that, formally?",
            "ISO format, please:",
        ),
        "redact": (
            "Mask personal information.",
            "Blank out phone numbers and mails.",
            "Censor who can be reached how.",
            "Strip identifiers from this.",
        ),
    }
)


def main(arguments: list[str]) -> int:
    """Writes all tasks below `--out`."""
    parser = argparse.ArgumentParser(prog="python -m deploy.demo.wordings")
    parser.add_argument("--out", type=Path, required=True)
    root = parser.parse_args(arguments).out
    for name in TASKS:
        write_task(root, asked_otherwise(generate(name, SEED, SIZES)))
    return 0


def asked_otherwise(task: Task) -> Task:
    """The task with its test rows from `KNOWN` on in other wordings, whose templates count on from the known ones."""
    known, others = len(TASKS[task.name].instructions), OTHERS[task.name]
    rows = list(task.test)
    for number in range(KNOWN, len(rows)):
        other = number % len(others)
        rows[number] = replace(rows[number], instruction=others[other], template=known + other)
    return replace(task, test=tuple(rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
