"""Queries with all adapters ranked for them, and what the tasks' folders say of each query."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routing.evaluate.held_out import read_metrics, read_object, read_references
from routing.train.data import TaskDataError, TaskRow, read_rows


@dataclass(frozen=True)
class RankedQuery:
    """One test row of a task. `references` are all accepted answers, `ranked` (name, score) of every adapter, best
    first.
    """

    task: str
    row: int
    example: TaskRow
    references: tuple[str, ...]
    ranked: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Rankings:
    """Queries in order of task and row. `encoder` says what ranked them, `metrics` each task's measure."""

    encoder: str
    queries: tuple[RankedQuery, ...]
    metrics: dict[str, str]
    groups: dict[str, tuple[str, ...]]


def read_rankings(file: Path, tasks: Path, rows: int | None = None) -> Rankings:
    """Reads `{"encoder", "queries": [{"task", "row", "target", "ranked": [[name, score], ...]}]}`.

    `row` counts from 0 within `<tasks>/<task>/test.jsonl`, from where the question is taken. At most `rows` queries a
    task are kept, the first. Metrics and groups come from `<tasks>/manifest.json`; without it tasks are compared by
    exact match.

    Raises:
        TaskDataError: the file is malformed, or does not belong to these tasks.
    """
    found = read_object(file)
    entries = found.get("queries")
    if not isinstance(entries, list) or not entries:
        raise TaskDataError(f"{file}: queries: expected a list of at least one query")
    examples: dict[str, tuple[tuple[TaskRow, ...], list[tuple[str, ...]]]] = {}
    queries, taken = [], Counter[str]()
    for number, entry in enumerate(entries):
        where = f"{file}: queries.{number}"
        task, row = _field(entry, "task", str, where), _field(entry, "row", int, where)
        taken[task] += 1
        if rows is not None and taken[task] > rows:
            continue
        if task not in examples:
            path = tasks / task / "test.jsonl"
            examples[task] = read_rows(path), read_references(path, read_rows(path))
        queries.append(_query(entry, task, row, *examples[task], where))
    manifest = tasks / "manifest.json"
    known = read_object(manifest).get("groups", {}) if manifest.is_file() else {}
    groups = {name: tuple(own) for name, own in known.items() if set(own) <= examples.keys()}
    return Rankings(
        str(found.get("encoder", "")), tuple(sorted(queries, key=_place)), read_metrics(tasks, examples), groups
    )


def _query(
    entry: Any, task: str, row: int, rows: Sequence[TaskRow], references: Sequence[tuple[str, ...]], where: str
) -> RankedQuery:
    if not 0 <= row < len(rows):
        raise TaskDataError(f"{where}.row: {row}, expected a row of {task}/test.jsonl, from 0 to {len(rows) - 1}")
    example = rows[row]
    if _field(entry, "target", str, where) != example.target:
        raise TaskDataError(f"{where}.target: {entry['target']!r} is not that of row {row} of {task}/test.jsonl")
    ranked = _field(entry, "ranked", list, where)
    try:
        pairs = tuple((str(name), float(score)) for name, score in ranked)
    except (TypeError, ValueError) as error:
        raise TaskDataError(f"{where}.ranked: expected pairs of a name and a score ({error})") from error
    pairs = tuple(sorted(pairs, key=lambda pair: -pair[1]))
    return RankedQuery(task, row, example, references[row], pairs)


def _place(query: RankedQuery) -> tuple[str, int]:
    return query.task, query.row


def _field(entry: Any, name: str, kind: type, where: str) -> Any:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TaskDataError(f"{where}.{name}: expected {kind.__name__}, got {json.dumps(value)[:80]}")
    return value
