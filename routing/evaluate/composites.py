"""Prompts that ask several tasks at once, and what an answer to one is worth: MeteoRA's composite-n.

Each prompt shows solved examples and asks for a numbered list; an answer is cut into its n numbered lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routing.evaluate.quality import scores
from routing.train.data import TaskDataError

FOLDER = "composite"
_NAME = re.compile(r"composite_(\d+)\.jsonl")
_NUMBERED = re.compile(r"^[ \t]*(\d{1,3})[.)](?:[ \t]+(.*))?$")


@dataclass(frozen=True)
class Composite:
    """One prompt of n sub-questions: their tasks, and for each all accepted answers, the target first."""

    row: int
    prompt: str
    tasks: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Parts:
    """A composite answer's worth. `texts` by sub-question, empty where none was given; `scores` by the tasks' metrics.

    `attempts` is MeteoRA's: the number of sub-questions that have an answer which is not empty.
    """

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    exact: tuple[float, ...]

    @property
    def attempts(self) -> int:
        return sum(bool(text) for text in self.texts)

    @property
    def correct(self) -> float:
        """Answers that are right, by exact match."""
        return sum(self.exact)


def split_answer(text: str, count: int) -> tuple[str, ...]:
    """The answers 1 to `count` of a numbered list, empty where one is missing.

    An item begins a line, "i." or "i)", and ends with the line; the first one of a number counts, so that examples
    which a model goes on to invent change nothing.
    """
    found: dict[int, str] = {}
    for line in text.splitlines():
        item = _NUMBERED.match(line)
        if item is not None:
            found.setdefault(int(item[1]), (item[2] or "").strip())
    return tuple(found.get(number, "") for number in range(1, count + 1))


def judge(composite: Composite, answer: str, metrics: Mapping[str, str]) -> Parts:
    """The parts of an answer, each scored by its task's metric; an empty part is worth nothing."""
    texts = split_answer(answer, len(composite.tasks))
    found = [
        scores(metrics[task], text, own) if text else {"score": 0.0, "em": 0.0}
        for task, text, own in zip(composite.tasks, texts, composite.references, strict=True)
    ]
    return Parts(texts, tuple(own["score"] for own in found), tuple(own["em"] for own in found))


def read_composites(root: Path, tasks: Collection[str], rows: int | None = None) -> dict[int, list[Composite]]:
    """The first `rows` prompts of each `<root>/composite/composite_<n>.jsonl` whose tasks are all in `tasks`, by n.

    Raises:
        TaskDataError: a file is malformed.
    """
    found: dict[int, list[Composite]] = {}
    for path in sorted((root / FOLDER).glob("composite_*.jsonl")):
        name = _NAME.fullmatch(path.name)
        if name is None:
            continue
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()][:rows]
        own = [_parse(line, row, int(name[1]), f"{path}, line {row + 1}") for row, line in enumerate(lines)]
        if own and all(set(composite.tasks) <= set(tasks) for composite in own):
            found[int(name[1])] = own
    return dict(sorted(found.items()))


def _parse(line: str, row: int, count: int, where: str) -> Composite:
    try:
        fields: dict[str, Any] = json.loads(line)
        prompt, tasks, targets = fields["prompt"], tuple(fields["tasks"]), tuple(fields["targets"])
        references: Sequence[Sequence[str]] = fields.get("references") or [[target] for target in targets]
        together = tuple(tuple(dict.fromkeys((target, *own))) for target, own in zip(targets, references, strict=True))
    except (ValueError, TypeError, KeyError) as error:
        raise TaskDataError(f"{where}: expected prompt, tasks, targets and references ({error})") from error
    texts = [prompt, *tasks, *(text for own in together for text in own)]
    if not all(isinstance(text, str) for text in texts) or not len(tasks) == len(together) == count:
        raise TaskDataError(f"{where}: expected texts, with {count} tasks and targets")
    return Composite(row, prompt, tasks, together)
