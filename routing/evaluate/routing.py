"""The evaluation of retrieval: encoders, untrained and trained, over groups of tasks and both query forms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from routing.encoder_model import PREFIX, EncoderModel
from routing.evaluate.calibration import Calibration, calibrate
from routing.evaluate.retrieval import (
    EmbeddedTask,
    MakePrototypes,
    Ranking,
    TaskTexts,
    by_task,
    cluster_confusion,
    mean_prototype,
    rank_tasks,
    raw_mean,
    retrieval_accuracy,
)
from routing.prototypes import prototypes as stored_prototypes
from routing.router_folder import read_router
from routing.train.data import Task
from routing.train.pairs import BOTH, FORMS
from routing.train.progress import Report

PROTOTYPES: Mapping[str, MakePrototypes] = {
    "mean": mean_prototype,
    "stored": stored_prototypes,
    "un-normalised mean": raw_mean,
}
"""`mean` is LoraRetriever's equation, `stored` what the server keeps, the last what an inner product makes of it."""


@dataclass(frozen=True, slots=True)
class Subject:
    """An encoder to evaluate: the base in `folder`, with a trained router's `change` or none, under a `label`."""

    label: str
    folder: Path
    change: Path | None = None
    prefix: str = PREFIX

    def seen(self) -> tuple[str, ...]:
        """The tasks that it was trained on."""
        return () if self.change is None else tuple(read_router(self.change).training.get("tasks", ()))


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """What is measured: `rows` test rows a task against prototypes of `samples` training rows.

    `curve` lists further numbers of samples a prototype; `calibration_rows` validation rows a task are the related
    prompts of the threshold.
    """

    samples: int = 20
    rows: int = 50
    calibration_rows: int = 20
    curve: tuple[int, ...] = ()
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Measured:
    """One encoder's results in one query form.

    `accuracy[group][prototypes][part]` are shares by `top1`...; `crossed[group]` those against mean prototypes of
    samples in the other form, as where people register whole prompts and then ask without the instruction.
    """

    label: str
    encoder: str
    form: str
    accuracy: dict[str, dict[str, dict[str, dict[str, float]]]]
    crossed: dict[str, dict[str, float]]
    curve: dict[str, dict[int, dict[str, float]]]
    tasks: dict[str, dict[str, float]]
    clusters: tuple[str, ...]
    confusion: tuple[tuple[float, ...], ...]
    calibration: Calibration
    rankings: list[dict[str, Any]] = field(repr=False)


def evaluate_routing(
    subjects: Sequence[Subject],
    tasks: Sequence[Task],
    groups: Mapping[str, Sequence[str]],
    plan: EvaluationPlan,
    report: Report,
) -> list[Measured]:
    """Measures every subject in every form. Only tasks of some group are embedded.

    Raises:
        EncoderError: an encoder cannot be loaded, or a trained router is not one of it.
    """
    used = {name for names in groups.values() for name in names}
    chosen = [task for task in tasks if task.name in used]
    found = []
    for number, subject in enumerate(subjects):
        encoder = EncoderModel.load(subject.folder, subject.change, device=plan.device, prefix=subject.prefix)
        most = max((plan.samples, *plan.curve))
        embedded = {}
        for turn, form in enumerate(FORMS):
            report(f"{subject.label}, {form}", (number * len(FORMS) + turn, len(subjects) * len(FORMS)))
            texts = [TaskTexts.of(task, form, "test", most, plan.rows) for task in chosen]
            embedded[form] = {text.name: text.embed(encoder) for text in texts}
        for form, other in (FORMS, FORMS[::-1]):
            found.append(_measure(subject, encoder, chosen, groups, form, embedded[form], embedded[other], plan))
    return found


def _measure(
    subject: Subject,
    encoder: EncoderModel,
    tasks: Sequence[Task],
    groups: Mapping[str, Sequence[str]],
    form: str,
    embedded: Mapping[str, EmbeddedTask],
    other: Mapping[str, EmbeddedTask],
    plan: EvaluationPlan,
) -> Measured:
    known = {name: _with_samples(task, task.samples, plan.samples) for name, task in embedded.items()}
    crossed = {name: _with_samples(task, other[name].samples, plan.samples) for name, task in embedded.items()}
    seen = subject.seen()
    largest = max(groups.values(), key=len)
    first = [known[name] for name in largest]
    rankings = rank_tasks(first)
    clusters, confusion = cluster_confusion(first, rankings)
    return Measured(
        label=subject.label,
        encoder=encoder.id,
        form=form,
        accuracy={
            group: {
                kind: retrieval_accuracy([known[name] for name in names], seen=seen, prototypes=make)
                for kind, make in PROTOTYPES.items()
            }
            for group, names in groups.items()
        },
        crossed={
            group: retrieval_accuracy([crossed[name] for name in names])["all"] for group, names in groups.items()
        },
        curve={
            group: {
                count: retrieval_accuracy([_with_samples(known[n], embedded[n].samples, count) for n in names])["all"]
                for count in plan.curve
            }
            for group, names in groups.items()
            if plan.curve
        },
        tasks={group: by_task(rank_tasks([known[name] for name in names])) for group, names in groups.items()},
        clusters=tuple(clusters),
        confusion=tuple(tuple(round(float(share), 4) for share in row) for row in confusion),
        calibration=calibrate(encoder, _related(encoder, tasks, [known[name] for name in largest], form, plan)),
        rankings=_ranked(rankings, [task.name for task in first], {task.name: task for task in tasks}),
    )


def _related(
    encoder: EncoderModel, tasks: Sequence[Task], known: Sequence[EmbeddedTask], form: str, plan: EvaluationPlan
) -> list[EmbeddedTask]:
    """The same prototypes with validation rows as queries."""
    by_name = {task.name: task for task in tasks}
    asked = [TaskTexts.of(by_name[task.name], form, "valid", 0, plan.calibration_rows) for task in known]
    return [
        EmbeddedTask(task.name, task.cluster, task.samples, texts.embed(encoder).queries)
        for task, texts in zip(known, asked, strict=True)
    ]


def _ranked(rankings: Sequence[Ranking], names: Sequence[str], tasks: Mapping[str, Task]) -> list[dict[str, Any]]:
    found = []
    for ranking in rankings:
        for row, scores in enumerate(ranking.scores):
            asked = tasks[ranking.gold].test[row]
            order = np.argsort(-scores, kind="stable")
            ranked = [[names[column], round(float(scores[column]), 6)] for column in order]
            found.append(
                {"task": ranking.gold, "row": row, "prompt": asked.prompt, "target": asked.target, "ranked": ranked}
            )
    return found


def _with_samples(task: EmbeddedTask, samples: np.ndarray, count: int) -> EmbeddedTask:
    return EmbeddedTask(task.name, task.cluster, samples[:count], task.queries)


def write_rankings(out: Path, measured: Sequence[Measured]) -> list[Path]:
    """One file `rankings-<label>-<form>.json` each: every query of the largest group with all adapters, best first."""
    paths = []
    for found in measured:
        form = "input" if found.form != BOTH else "instruction"
        path = out / f"rankings-{found.label}-{form}.json"
        content = {"encoder": found.encoder, "form": found.form, "queries": found.rankings}
        path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


def as_json(measured: Sequence[Measured], plan: EvaluationPlan, groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Everything but the rankings."""
    results = []
    for found in measured:
        fields = {name: getattr(found, name) for name in found.__slots__ if name not in ("rankings", "calibration")}
        results.append(fields | {"calibration": asdict(found.calibration)})
    return {"plan": asdict(plan), "groups": {name: list(names) for name, names in groups.items()}, "results": results}
