"""The retrieval evaluation as a page of Markdown tables, plots and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from routing.evaluate.retrieval import KS
from routing.evaluate.routing import EvaluationPlan, Measured, as_json, write_rankings
from routing.evaluate.svg import heat_map, line_chart


def write_report(
    out: Path, measured: Sequence[Measured], plan: EvaluationPlan, groups: Mapping[str, Sequence[str]]
) -> list[Path]:
    """Writes routing.json, routing.md, one plot of accuracy over k, confusion of clusters, and the rankings."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "routing.json": json.dumps(as_json(measured, plan, groups), indent=2, ensure_ascii=False) + "\n",
        "routing.md": markdown(measured, plan, groups),
    }
    for group, names in groups.items():
        lines = {
            f"{found.label}, {found.form}": [found.accuracy[group]["mean"]["all"][f"top{k}"] for k in KS]
            for found in measured
        }
        title = f"Own adapter among the first k, {group} ({len(names)} tasks), %"
        texts[f"accuracy-{group}.svg"] = line_chart(title, [f"k = {k}" for k in KS], lines)
    for found in measured:
        form = found.form.partition("+")[0]
        title = f"Cluster asked (row) and found first (column), {found.label}, {found.form}, %"
        texts[f"confusion-{found.label}-{form}.svg"] = heat_map(title, found.clusters, found.confusion)
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [*(out / name for name in texts), *write_rankings(out, measured)]


def markdown(measured: Sequence[Measured], plan: EvaluationPlan, groups: Mapping[str, Sequence[str]]) -> str:
    """Tables of retrieval, of the number of samples if it was varied, of thresholds and of the hardest tasks."""
    shown = " / ".join(str(k) for k in KS)
    lines = [
        "# Retrieval",
        "",
        f"First {plan.rows} test rows of a task, prototypes of its first {plan.samples} training rows in the query's "
        f"form, cosine. Percent of queries whose own adapter is among the first {shown}; the candidates are always "
        "all tasks of the group.",
    ]
    for group, names in groups.items():
        lines += [
            "",
            f"## {group} ({len(names)} tasks)",
            "",
            "| encoder | query | prototypes | tasks | queries | top |",
        ]
        lines += ["|---|---|---|---|---|---|"]
        lines += [row for found in measured for row in _rows(found, group)]
        if plan.curve:
            lines += _curve(group, measured, plan)
    return "\n".join([*lines, *_thresholds(measured), *_hardest(measured, groups), ""])


def _rows(found: Measured, group: str) -> list[str]:
    rows = [(kind, part, shares) for kind, parts in found.accuracy[group].items() for part, shares in parts.items()]
    rows.append(("mean, of the other form", "all", found.crossed[group]))
    return [
        f"| {found.label} | {found.form} | {kind} | {part} | {shares['queries']:.0f} | {_shares(shares)} |"
        for kind, part, shares in rows
    ]


def _curve(group: str, measured: Sequence[Measured], plan: EvaluationPlan) -> list[str]:
    head = [f"{count}" for count in plan.curve]
    lines = [
        "",
        "Samples a prototype:",
        "",
        f"| encoder | query | {' | '.join(head)} |",
        "|---|---|" + "---|" * len(head),
    ]
    for found in measured:
        cells = [_shares(found.curve[group][count]) for count in plan.curve]
        lines.append(f"| {found.label} | {found.form} | {' | '.join(cells)} |")
    return lines


def _thresholds(measured: Sequence[Measured]) -> list[str]:
    lines = [
        "",
        "## Prompts that no adapter is for",
        "",
        "The last two columns are medians of the best score, of unrelated prompts and of prompts of the tasks.",
        "",
        "| encoder | query | min_score | unrelated above it | of the tasks below it | unrelated | of the tasks |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in measured:
        c = found.calibration
        lines.append(
            f"| {found.label} | {found.form} | {c.min_score:.3f} | {c.accepted:.1%} of {c.unrelated} | "
            f"{c.refused:.1%} of {c.related} | {c.unrelated_median:.3f} | {c.related_median:.3f} |"
        )
    return lines


def _hardest(measured: Sequence[Measured], groups: Mapping[str, Sequence[str]], count: int = 8) -> list[str]:
    lines = ["", "## Tasks found least often", ""]
    for found in measured:
        for group in groups:
            worst = sorted(found.tasks[group].items(), key=lambda item: item[1])[:count]
            listed = ", ".join(f"{name} {share:.0%}" for name, share in worst)
            lines.append(f"- {found.label}, {found.form}, {group}: {listed}")
    return lines


def _shares(shares: Mapping[str, float]) -> str:
    return " / ".join(f"{100 * shares[f'top{k}']:.1f}" for k in KS)
