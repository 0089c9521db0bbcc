"""Task folders: `<task>/{train,valid,test}.jsonl`, one instruction row a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

SPLITS = ("train", "valid", "test")


class TaskDataError(Exception):
    """A task folder cannot be read; the message names the file, the line and the field."""


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One example: the user says `prompt`, the model is to answer exactly `target`."""

    task: str
    cluster: str
    instruction: str
    input: str
    target: str
    template: int

    @property
    def prompt(self) -> str:
        """The one user message of the chat."""
        return "\n".join(part for part in (self.instruction, self.input) if part)


@dataclass(frozen=True, slots=True)
class Task:
    """A task's rows by split; `valid` and `test` are held out from `train`."""

    name: str
    train: tuple[TaskRow, ...]
    valid: tuple[TaskRow, ...]
    test: tuple[TaskRow, ...]


def read_task(folder: Path) -> Task:
    """Reads one task folder.

    Raises:
        TaskDataError: a split is missing, empty or malformed, or a held-out row is also a training row.
    """
    if not folder.is_dir():
        raise TaskDataError(f"{folder}: no such task folder")
    train, valid, test = (read_rows(folder / f"{split}.jsonl") for split in SPLITS)
    seen = {row.prompt for row in train}
    for split, rows in (("valid", valid), ("test", test)):
        for number, row in enumerate(rows, start=1):
            if row.prompt in seen:
                raise TaskDataError(f"{folder / split}.jsonl, line {number}: input is also a training row's")
    return Task(folder.name, train, valid, test)


def read_tasks(root: Path) -> list[Task]:
    """Reads every sub-folder of `root` that holds a train.jsonl, by name.

    Raises:
        TaskDataError: there is none, or one is malformed.
    """
    folders = sorted(path.parent for path in root.glob("*/train.jsonl"))
    if not folders:
        raise TaskDataError(f"{root}: expected folders <task>/{{train,valid,test}}.jsonl")
    return [read_task(folder) for folder in folders]


def read_rows(path: Path) -> tuple[TaskRow, ...]:
    """Reads one JSON Lines file of rows; blank lines are skipped.

    Raises:
        TaskDataError: the file is missing, empty or malformed.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskDataError(f"{path}: expected a readable UTF-8 file ({error})") from error
    rows = tuple(_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip())
    if not rows:
        raise TaskDataError(f"{path}: expected at least one row")
    return rows


def write_task(root: Path, task: Task) -> Path:
    """Writes the task's three files under `root` and returns its folder."""
    folder = root / task.name
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, Sequence[TaskRow]] = {"train": task.train, "valid": task.valid, "test": task.test}
    for split, rows in splits.items():
        text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def _parse(line: str, where: str) -> TaskRow:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise TaskDataError(f"{where}: expected a JSON object ({error})") from error
    if not isinstance(found, dict):
        raise TaskDataError(f"{where}: expected a JSON object, got {type(found).__name__}")
    values: dict[str, Any] = {}
    for field in fields(TaskRow):
        kind: type = int if field.name == "template" else str
        value = found.get(field.name)
        if not isinstance(value, kind) or isinstance(value, bool):
            shown = "nothing" if field.name not in found else json.dumps(value)
            raise TaskDataError(f"{where}: field {field.name}: expected {kind.__name__}, got {shown}")
        values[field.name] = value
    for name in ("instruction", "target"):
        if not values[name].strip():
            raise TaskDataError(f"{where}: field {name}: expected text, got an empty string")
    return TaskRow(**values)
