"""Scores of methods over test rows and composite prompts, as means with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from routing.evaluate.bootstrap import by_task, interval, resampled

Json = dict[str, Any]

ORACLE = "oracle"


@dataclass
class Lines:
    """The lines of every job that is done: of `tasks` and `losses` by method, of `composites` by part too.

    Methods stay in `order`, in whatever order their jobs end.
    """

    order: Sequence[str] = ()
    tasks: dict[str, list[Json]] = field(default_factory=dict)
    losses: dict[str, list[Json]] = field(default_factory=dict)
    composites: dict[str, dict[str, list[Json]]] = field(default_factory=dict)

    def add(self, part: str, method: str, lines: Sequence[Json]) -> None:
        """`part` is that of a job."""
        if part == "tasks":
            self.tasks = self._ordered({**self.tasks, method: list(lines)})
        elif part == "loss":
            self.losses = self._ordered({**self.losses, method: list(lines)})
        else:
            self.composites[part] = self._ordered({**self.composites.get(part, {}), method: list(lines)})

    def _ordered(self, lines: dict[str, list[Json]]) -> dict[str, list[Json]]:
        places = {method: place for place, method in enumerate(dict.fromkeys(self.order))}
        return dict(sorted(lines.items(), key=lambda item: places.get(item[0], len(places))))

    def shown(self, part: str, method: str) -> str:
        """The method's figures in a few words."""
        if part == "tasks":
            found = task_scores({method: self.tasks[method]}, seed=0)[method]
            return f"{100 * found['mean']:.1f} %"
        if part == "loss":
            return f"perplexity {loss_scores({method: self.losses[method]}, seed=0)[method]['perplexity']:.3f}"
        own = composite_scores({method: self.composites[part][method]}, seed=0)[method]
        return f"{own['attempts']:.2f} attempts, {own['correct']:.2f} correct of {len(own['tasks'])}"


def task_scores(lines: Mapping[str, Sequence[Json]], seed: int, beside: str | None = None) -> Json:
    """By method: the mean over tasks of its scores, by task too, and what it is better by than the oracle adapters.

    All methods have the same rows. With `beside` also what each is better by than this method. Intervals are those of
    a bootstrap that draws rows within each task, the same ones for all methods. `share` is what the gates gave to the
    task's own adapter, mean over the rows that say so; `wordings` the mean of the rows by their instruction's wording.
    """
    if not lines:
        return {}
    methods = list(lines)
    tasks = [line["task"] for line in lines[methods[0]]]
    names = list(dict.fromkeys(tasks))
    places = np.array([names.index(task) for task in tasks])
    scores = np.array([[line["score"] for line in lines[method]] for method in methods])
    exact = by_task(np.array([[line["em"] for line in lines[method]] for method in methods]), places, len(names))
    means, drawn = by_task(scores, places, len(names)), resampled(scores, places, len(names), seed).mean(1)
    found: Json = {}
    for place, method in enumerate(methods):
        shares = [line["share"] for line in lines[method] if "share" in line]
        found[method] = {
            "mean": float(means[place].mean()),
            "interval": interval(drawn[place]),
            "exact_match": float(exact[place].mean()),
            "tasks": dict(zip(names, means[place].tolist(), strict=True)),
            "share": float(np.mean(shares)) if shares else None,
            "wordings": _by_wording(lines[method]),
            "above_oracle": None,
        }
        for key, name in {"above_oracle": ORACLE, **({"above": beside} if beside else {})}.items():
            if name in methods and method != name:
                other = methods.index(name)
                difference = float((means[place] - means[other]).mean())
                found[method][key] = {"mean": difference, "interval": interval(drawn[place] - drawn[other])}
    return found


def _by_wording(lines: Sequence[Json]) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for line in sorted((line for line in lines if "wording" in line), key=lambda line: int(line["wording"])):
        scores.setdefault(str(line["wording"]), []).append(line["score"])
    return {wording: float(np.mean(own)) for wording, own in scores.items()}


def loss_scores(lines: Mapping[str, Sequence[Json]], seed: int) -> Json:
    """By method the perplexity of the targets: exp of the mean over tasks of the rows' mean loss a token.

    Intervals are those of a bootstrap that draws rows within each task, the same ones for all methods.
    """
    found: Json = {}
    for method, own in lines.items():
        names = list(dict.fromkeys(line["task"] for line in own))
        places = np.array([names.index(line["task"]) for line in own])
        losses = np.array([[line["loss"] for line in own]])
        means, drawn = by_task(losses, places, len(names))[0], resampled(losses, places, len(names), seed)[0].mean(0)
        found[method] = {
            "perplexity": float(np.exp(means.mean())),
            "interval": [float(np.exp(value)) for value in interval(drawn)],
            "tasks": dict(zip(names, np.exp(means).tolist(), strict=True)),
        }
    return found


def composite_scores(lines: Mapping[str, Sequence[Json]], seed: int) -> Json:
    """By method: mean attempts and exactly right answers a prompt, and by task the share of prompts with a right one.

    Intervals are those of a bootstrap over prompts, the same ones for all methods.
    """
    found: Json = {}
    for method, own in lines.items():
        counted = np.array([[line["attempts"] for line in own], [line["correct"] for line in own]])
        drawn = resampled(counted, np.zeros(len(own), dtype=np.int64), 1, seed)[:, 0]
        exact = np.array([line["em"] for line in own]).mean(0)
        found[method] = {
            "attempts": float(counted[0].mean()),
            "attempts_interval": interval(drawn[0]),
            "correct": float(counted[1].mean()),
            "correct_interval": interval(drawn[1]),
            "prompts": len(own),
            "tasks": dict(zip(own[0]["tasks"], exact.tolist(), strict=True)),
        }
    return found


def apart(tasks: Mapping[str, Json], name: str) -> Json:
    """By method the mean of the task `name`, and that over all other tasks."""
    found: Json = {}
    for method, own in tasks.items():
        others = [score for task, score in own["tasks"].items() if task != name]
        found[method] = {"own": own["tasks"][name], "others": sum(others) / len(others) if others else None}
    return found
