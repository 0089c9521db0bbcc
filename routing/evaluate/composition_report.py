"""Scores of every query under every setting, as means with confidence intervals, by task and cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from routing.evaluate.bootstrap import by_task, interval, resampled
from routing.evaluate.markdown import percent, percent_range, table_head, table_row

Json = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """`scores` (settings, queries) in [0, 1] of queries whose `tasks` and `clusters` are given, one each."""

    settings: tuple[str, ...]
    tasks: tuple[str, ...]
    clusters: tuple[str, ...]
    scores: np.ndarray

    def result(self, groups: Mapping[str, Sequence[str]], seed: int = 0) -> Json:
        """Every setting's mean over tasks, of all and of each group; by cluster; by task; and what it is better by
        than the selection of the same candidates. Intervals are those of a bootstrap that draws rows within each task,
        the same ones for all settings.
        """
        names = sorted(set(self.tasks))
        places = np.array([names.index(task) for task in self.tasks])
        means = by_task(self.scores, places, len(names))
        drawn = resampled(self.scores, places, len(names), seed)
        cluster_of = dict(zip(self.tasks, self.clusters, strict=True))
        clusters = {name: [t for t in names if cluster_of[t] == name] for name in dict.fromkeys(self.clusters)}
        found: Json = {}
        for place, setting in enumerate(self.settings):
            found[setting] = {
                "mean": float(means[place].mean()),
                "interval": interval(drawn[place].mean(0)),
                "groups": {name: _mean(means[place], names, own) for name, own in groups.items()},
                "clusters": {name: _mean(means[place], names, own) for name, own in clusters.items()},
                "tasks": dict(zip(names, means[place].tolist(), strict=True)),
                "above_selection": self._above_selection(place, means, drawn),
            }
        return found

    def _above_selection(self, place: int, means: np.ndarray, drawn: np.ndarray) -> Json | None:
        """Paired: the same rows under both settings."""
        method, _, candidates = self.settings[place].partition("/")
        other = f"selection/{candidates}"
        if method == "selection" or other not in self.settings:
            return None
        base = self.settings.index(other)
        difference = means[place].mean() - means[base].mean()
        return {"mean": float(difference), "interval": interval(drawn[place].mean(0) - drawn[base].mean(0))}


def _mean(means: np.ndarray, names: Sequence[str], own: Sequence[str]) -> float:
    return float(np.mean([means[names.index(name)] for name in own]))


def markdown(result: Mapping[str, Json], metrics: Mapping[str, str], rows: Mapping[str, int]) -> str:
    """Three tables: all settings with intervals, by cluster, and by task. Figures are percent."""
    settings = list(result)
    groups, clusters = (list(result[settings[0]][kind]) for kind in ("groups", "clusters"))
    lines = table_head(["setting", "mean", "95 % interval", "above selection", *groups])
    for name in settings:
        own, above = result[name], result[name]["above_selection"]
        better = "" if above is None else f"{100 * above['mean']:+.1f} ({percent_range(above['interval'], '+')})"
        shown = [
            percent(own["mean"]),
            percent_range(own["interval"]),
            better,
            *(percent(own["groups"][g]) for g in groups),
        ]
        lines.append(table_row([name, *shown]))
    lines += ["", *table_head(["cluster", *settings])]
    lines += [table_row([c, *(percent(result[name]["clusters"][c]) for name in settings)]) for c in clusters]
    lines += ["", *table_head(["task", "metric", "rows", *settings])]
    for task in result[settings[0]]["tasks"]:
        shown = [percent(result[name]["tasks"][task]) for name in settings]
        lines.append(table_row([task, metrics[task], str(rows[task]), *shown]))
    return "\n".join(lines) + "\n"
