"""Test rows of tasks with everything that counts as a right answer, and how each task is scored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routing.evaluate.quality import METRICS
from routing.train.data import TaskDataError, TaskRow, read_rows


@dataclass(frozen=True)
class HeldOut:
    """Row `row` of a task's test.jsonl. `references` are all accepted answers, the target first."""

    task: str
    row: int
    example: TaskRow
    references: tuple[str, ...]
    metric: str


def read_held_out(root: Path, names: Iterable[str], rows: int | None = None) -> list[HeldOut]:
    """The first `rows` test rows of every task, None for all. Raises TaskDataError."""
    names = list(names)
    metrics = read_metrics(root, names)
    found = []
    for name in names:
        path = root / name / "test.jsonl"
        examples = read_rows(path)
        accepted = read_references(path, examples)
        both = list(zip(examples, accepted, strict=True))[:rows]
        found += [HeldOut(name, row, example, own, metrics[name]) for row, (example, own) in enumerate(both)]
    return found


def read_metrics(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Each task's measure as `<root>/manifest.json` says, exact match where it says nothing.

    Raises:
        TaskDataError: the manifest is malformed, or names a measure that is not known.
    """
    path = root / "manifest.json"
    known = read_object(path).get("tasks", {}) if path.is_file() else {}
    found = {}
    for name in names:
        entry = known.get(name, {}) if isinstance(known, dict) else None
        metric = entry.get("metric", "em") if isinstance(entry, dict) else None
        if metric not in METRICS:
            raise TaskDataError(f"{path}: tasks.{name}.metric: expected one of {', '.join(METRICS)}, got {metric!r}")
        found[name] = str(metric)
    return found


def read_references(path: Path, rows: Sequence[TaskRow]) -> list[tuple[str, ...]]:
    """All accepted answers of each of the file's rows: its target, then what it has under `references`."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    return [accepted(row.target, line) for row, line in zip(rows, lines, strict=True)]


def accepted(target: str, fields: dict[str, Any]) -> tuple[str, ...]:
    """The target and the references of one row's fields, none twice."""
    return tuple(dict.fromkeys((target, *(str(text) for text in fields.get("references", ())))))


def read_object(file: Path) -> dict[str, Any]:
    """Raises TaskDataError for anything but a JSON object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TaskDataError(f"{file}: expected a JSON file ({error})") from error
    if not isinstance(found, dict):
        raise TaskDataError(f"{file}: expected a JSON object, got {type(found).__name__}")
    return found
