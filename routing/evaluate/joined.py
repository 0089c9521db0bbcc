"""One table of evaluations that asked the same questions of different methods, as if one process had asked them all:

python -m routing.evaluate.joined --out DIR --beside "plain LoRA" EVALUATION EVALUATION
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routing.evaluate.answers import AnswerError
from routing.evaluate.gate_jobs import answers_file
from routing.evaluate.gate_scores import Lines
from routing.evaluate.gates_report import document, write_report
from routing.train.progress import say

Json = dict[str, Any]

Answers = dict[tuple[str, str], list[Json]]
"""Lines by what was asked and of which method."""

SETTING = ("device", "dtype", "model_fingerprint")


@dataclass(frozen=True)
class Part:
    """The folder of one evaluation, and its gates.json."""

    folder: Path
    found: Json

    @classmethod
    def read(cls, folder: Path) -> Part:
        """Raises AnswerError."""
        path = folder / "gates.json"
        try:
            return cls(folder, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise AnswerError(f"{path}: expected the gates.json of an evaluation ({error})") from error

    def answers(self) -> Iterator[tuple[str, str, list[Json]]]:
        """What was asked, of which method, and the lines. Raises AnswerError."""
        asked = {"tasks": self.found["tasks"], "loss": self.found["perplexity"], **self.found["composites"]}
        for part, methods in asked.items():
            for method in methods:
                yield part, method, self._lines(part, method)

    def _lines(self, part: str, method: str) -> list[Json]:
        path = self.folder / "answers" / answers_file(part, method)
        try:
            _, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise AnswerError(f"{path}: expected the answers of {method} ({error})") from error
        return lines


def join(folders: Sequence[Path], out: Path, beside: str | None = None, wordings: Collection[int] = ()) -> Json:
    """Writes gates.json, gates.md and plots of all methods into `out`, in the order of the folders; its content.

    All were asked the same rows in the same order: differences between methods of two evaluations are paired, and
    intervals are those of one process. A method that several asked has the answers of the first. `beside`: a method
    that all others are compared with, as with the oracle adapters. `wordings`: only rows of single tasks whose
    instructions have one of them; none for all rows.

    Raises:
        AnswerError: an evaluation cannot be read, or differs from the first in its device, model or rows, two have
            different routers of one label, none asked the method `beside`, or no row has one of the `wordings`.
    """
    parts = [Part.read(folder) for folder in folders]
    _check_settings(parts)
    rows: dict[str, tuple[Path, list[tuple[str, int]]]] = {}
    found: Answers = {}
    for part in parts:
        for asked, method, lines in part.answers():
            own = [(str(line.get("task", line.get("tasks"))), int(line["row"])) for line in lines]
            first, expected = rows.setdefault(asked, (part.folder, own))
            if own != expected:
                raise AnswerError(f"{part.folder}: {asked} of {method}: expected the same rows as in {first}")
            found.setdefault((asked, method), lines)
    if beside is not None and ("tasks", beside) not in found:
        methods = "; ".join(method for asked, method in found if asked == "tasks")
        raise AnswerError(f"beside {beside}: expected one of the methods: {methods}")
    if wordings:
        found = _worded(found, wordings)
    every = Lines([method for _, method in found])
    for (asked, method), lines in found.items():
        every.add(asked, method, lines)
    made = _document(parts, every, beside)
    write_report(out, made)
    return made


def _worded(found: Answers, wordings: Collection[int]) -> Answers:
    """Losses are those of the rows whose answers say their wording; composite prompts have none."""
    told = (line for (asked, _), lines in found.items() if asked == "tasks" for line in lines)
    kept = {(line["task"], line["row"]) for line in told if line.get("wording") in wordings}
    if not kept:
        raise AnswerError(f"wordings {', '.join(map(str, wordings))}: no row has one of them")
    single = {key: lines for key, lines in found.items() if key[0] in ("tasks", "loss")}
    return {key: [line for line in lines if (line["task"], line["row"]) in kept] for key, lines in single.items()}


def _document(parts: Sequence[Part], lines: Lines, beside: str | None) -> Json:
    arguments = [part.found["arguments"] for part in parts]
    new = dict.fromkeys(name for each in arguments for name in each["new"])
    curve = [(point["rows"], point["method"]) for part in parts for point in part.found["curve"]]
    heated = {
        method: (at["router"], at["temperature"]) for part in parts for method, at in part.found["temperatures"].items()
    }
    return {
        "evaluation": "gates",
        "parts": {part.folder.name: each for part, each in zip(parts, arguments, strict=True)},
        **{key: parts[0].found[key] for key in (*SETTING, "versions", "metrics")},
        **{key: _united(parts, key) for key in ("routers", "prompt_routers")},
        "seconds": round(sum(part.found["seconds"] for part in parts), 1),
        **document(lines, curve, heated, tuple(new), arguments[0]["seed"], beside),
    }


def _check_settings(parts: Sequence[Part]) -> None:
    for part in parts[1:]:
        for key in SETTING:
            own, first = part.found[key], parts[0].found[key]
            if own != first:
                raise AnswerError(f"{part.folder}: {key} {own}: expected {first}, as in {parts[0].folder}")


def _united(parts: Sequence[Part], key: str) -> Mapping[str, Json]:
    """Of routers, by label."""
    found: dict[str, Json] = {}
    for part in parts:
        for label, router in part.found[key].items():
            if found.setdefault(label, router)["sha256"] != router["sha256"]:
                raise AnswerError(f"{part.folder}: router {label}: another one than elsewhere under this label")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 0 done, 2 the evaluations do not fit together."""
    asked = _parser().parse_args(arguments)
    try:
        join(asked.evaluations, asked.out, asked.beside, asked.wordings)
    except AnswerError as error:
        say(str(error))
        return 2
    sys.stdout.write((asked.out / "gates.md").read_text(encoding="utf-8"))
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").split(":")[0]
    parser = argparse.ArgumentParser(prog="python -m routing.evaluate.joined", description=about)
    parser.add_argument("evaluations", type=Path, nargs="+", metavar="EVALUATION", help="one's folder")
    parser.add_argument("--beside", metavar="METHOD", help="that all others are compared with, too")
    parser.add_argument(
        "--wordings", type=_numbers, default=(), metavar="N,N", help="only rows whose instructions have these [all]"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of tables and plots")
    return parser


if __name__ == "__main__":
    sys.exit(main())
