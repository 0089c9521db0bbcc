"""An evaluation of token-level routers as JSON, Markdown tables and plots."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from routing.evaluate.gate_scores import ORACLE, Lines, apart, composite_scores, loss_scores, task_scores
from routing.evaluate.markdown import percent, percent_range, table_head, table_row
from routing.evaluate.prompt_report import plots as prompt_plots
from routing.evaluate.prompt_report import routed_scores
from routing.evaluate.prompt_report import tables as prompt_tables
from routing.evaluate.svg import line_chart

Json = dict[str, Any]


def document(
    lines: Lines,
    curve: Sequence[tuple[int, str]],
    temperatures: Mapping[str, tuple[str, float]],
    new: Sequence[str],
    seed: int,
    beside: str | None = None,
) -> Json:
    """Everything that follows from the answers.

    Args:
        curve: (training rows a task, method) of routers that were trained on so few.
        temperatures: (router, temperature) of the methods of composite prompts that have one.
        new: tasks each of which is reported apart.
        beside: a method that all others are compared with, as with the oracle adapters.
    """
    tasks = task_scores(lines.tasks, seed, beside)
    return {
        **({"beside": beside} if beside else {}),
        "tasks": tasks,
        "perplexity": loss_scores(lines.losses, seed),
        "routed": routed_scores(lines.tasks),
        "curve": [{"rows": rows, "method": method} for rows, method in curve if method in tasks],
        "new": {name: apart(tasks, name) for name in new} if tasks else {},
        "composites": {part: composite_scores(own, seed) for part, own in lines.composites.items()},
        "temperatures": {method: {"router": label, "temperature": t} for method, (label, t) in temperatures.items()},
    }


def write_report(out: Path, found: Json) -> None:
    """Writes gates.json, gates.md and the plots of what `document` made, with whatever else stands in it."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {"gates.json": json.dumps(found, indent=1, ensure_ascii=False) + "\n", "gates.md": markdown(found)}
    for name, text in (texts | plots(found)).items():
        partial = out / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(out / name)


def markdown(found: Json) -> str:
    """The tables; figures are percent, for composite prompts numbers of answers a prompt."""
    lines = [
        *_methods(found["tasks"], found.get("beside")),
        *_wordings(found["tasks"]),
        *_curve(found),
        *_new(found["new"]),
    ]
    lines += _perplexity(found["perplexity"])
    lines += prompt_tables(found.get("prompt_routers", {}), found["routed"])
    for part, methods in found["composites"].items():
        lines += _composites(part, methods)
    return "\n".join([*lines, *_tasks(found["tasks"])]).strip() + "\n"


def plots(found: Json) -> dict[str, str]:
    """`curve.svg` over training rows, and plots over temperatures by composite part and router; from two points on."""
    charts = prompt_plots(found.get("prompt_routers", {}))
    curve, tasks = found["curve"], found["tasks"]
    if len(curve) > 1:
        lines = {"router, top 2": [tasks[point["method"]]["mean"] for point in curve]}
        lines |= {name: [tasks[name]["mean"]] * len(curve) for name in (ORACLE, "base") if name in tasks}
        positions = [str(point["rows"]) for point in curve]
        charts["curve.svg"] = line_chart("Score over training rows a task, %", positions, lines)
    for part, methods in found["composites"].items():
        for router, points in _heated(methods, found["temperatures"]).items():
            fixed = {name: _share(own) for name, own in methods.items() if name not in found["temperatures"]}
            lines = {router: list(points.values()), **_best(fixed, len(points))}
            title = f"Right answers over temperatures, {part}, %"
            name = re.sub("[^a-z0-9]+", "-", f"{part} {router}".lower()).strip("-")
            charts[f"{name}.svg"] = line_chart(title, [f"{temperature:g}" for temperature in points], lines)
    return charts


def _heated(methods: Mapping[str, Json], temperatures: Mapping[str, Json]) -> dict[str, dict[float, float]]:
    """By router the share of right answers by temperature, in ascending order, where there are two or more."""
    found: dict[str, dict[float, float]] = {}
    for method, at in sorted(temperatures.items(), key=lambda item: float(item[1]["temperature"])):
        if method in methods:
            found.setdefault(at["router"], {})[at["temperature"]] = _share(methods[method])
    return {router: points for router, points in found.items() if len(points) > 1}


def _share(own: Json) -> float:
    return float(own["correct"] / len(own["tasks"]))


def _best(fixed: Mapping[str, float], points: int) -> dict[str, list[float]]:
    """The four highest as level lines: a plot of all merges would hide the others."""
    highest = sorted(fixed.items(), key=lambda item: -item[1])[:4]
    return {name: [share] * points for name, share in highest}


def _methods(tasks: Mapping[str, Json], beside: str | None) -> list[str]:
    others = {"above_oracle": "above the oracle adapters"} | ({"above": f"above {beside}"} if beside else {})
    lines = table_head(["method", "mean", "95 % interval", *others.values(), "exact match", "share of the own"])
    for name, own in tasks.items():
        shown = [percent(own["mean"]), percent_range(own["interval"]), *(_above(own.get(key)) for key in others)]
        lines.append(table_row([name, *shown, percent(own["exact_match"]), percent(own["share"])]))
    return lines


def _above(found: Json | None) -> str:
    return "" if found is None else f"{100 * found['mean']:+.1f} ({percent_range(found['interval'], '+')})"


def _wordings(tasks: Mapping[str, Json]) -> list[str]:
    """Where instructions have several: some may be in no training row."""
    names = list(next(iter(tasks.values()), {}).get("wordings", {}))
    if len(names) < 2:
        return []
    lines = ["", *table_head(["method", *(f"wording {name}" for name in names)])]
    return [
        *lines,
        *(table_row([m, *(percent(own["wordings"].get(name)) for name in names)]) for m, own in tasks.items()),
    ]


def _curve(found: Json) -> list[str]:
    if not found["curve"]:
        return []
    points = [found["tasks"][point["method"]] for point in found["curve"]]
    return [
        "",
        *table_head(["training rows a task", *(str(point["rows"]) for point in found["curve"])]),
        table_row(["mean", *(percent(point["mean"]) for point in points)]),
        table_row(["95 % interval", *(percent_range(point["interval"]) for point in points)]),
    ]


def _new(new: Mapping[str, Json]) -> list[str]:
    lines: list[str] = []
    for task, methods in new.items():
        lines += ["", *table_head(["method", task, "the other tasks"])]
        for name, own in methods.items():
            lines.append(table_row([name, percent(own["own"]), percent(own["others"])]))
    return lines


def _perplexity(methods: Mapping[str, Json]) -> list[str]:
    if not methods:
        return []
    lines = ["", *table_head(["method", "perplexity of the targets", "95 % interval"])]
    return [
        *lines,
        *(table_row([m, f"{own['perplexity']:.3f}", _plain(own["interval"])]) for m, own in methods.items()),
    ]


def _composites(part: str, methods: Mapping[str, Json]) -> list[str]:
    names = list(next(iter(methods.values()))["tasks"])
    lines = ["", *table_head([part, "attempts", "95 % interval", "correct", "95 % interval", *names])]
    for name, own in methods.items():
        counts = [f"{own['attempts']:.2f}", _plain(own["attempts_interval"])]
        counts += [f"{own['correct']:.2f}", _plain(own["correct_interval"])]
        lines.append(table_row([name, *counts, *(percent(own["tasks"][task]) for task in names)]))
    return lines


def _tasks(tasks: Mapping[str, Json]) -> list[str]:
    if not tasks:
        return []
    names = list(next(iter(tasks.values()))["tasks"])
    lines = ["", *table_head(["method", *names])]
    return [
        *lines,
        *(table_row([name, *(percent(own["tasks"][task]) for task in names)]) for name, own in tasks.items()),
    ]


def _plain(values: Sequence[float]) -> str:
    return f"{values[0]:.2f} to {values[1]:.2f}"
