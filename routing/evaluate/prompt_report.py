"""Prompt-level routers as tables and plots: what they chose on test rows, and what their cards say of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from adapters_store.types import TARGETS
from routing.evaluate.markdown import percent, table_head, table_row
from routing.evaluate.prompt_methods import CURVE, EvaluatedPromptRouter
from routing.evaluate.svg import curve_chart, line_chart
from routing.prompt_router import MODULES

Json = dict[str, Any]

SHOWN_LAYERS = 5
"""Learned activations in one picture."""


def described(router: EvaluatedPromptRouter) -> Json:
    """What the tables and plots need of a router: its form, its metrics in training, its activations by layer."""
    form, training = router.card.form, router.card.training
    names = [adapter.name for adapter in router.card.adapters] + ["(none)"] * router.card.has_null
    return {
        "kind": router.card.kind,
        "experts": form.experts,
        "names": list(TARGETS) if form.experts == MODULES else names,
        "top_k": form.top_k,
        "pooling": form.pooling,
        "activation": form.activation,
        "decision": form.decision,
        "depth": form.depth,
        "sha256": router.card.sha256,
        "recipe": training.get("recipe"),
        "metrics": training.get("metrics", {}),
        "curves": [list(curve) for curve in router.curves],
    }


def routed_scores(lines: Mapping[str, Sequence[Json]]) -> Json:
    """By method, of those whose lines say what was chosen.

    `usage`: how often each expert is, over rows and layers; `tasks` the same by task. `steady`: in how many layers the
    choice is that of the layer before. `entropy`: mean over the rows.
    """
    found: Json = {}
    for method, own in lines.items():
        if not own or "chosen" not in own[0]:
            continue
        experts = 1 + max(expert for line in own for layer in line["chosen"] for expert in layer)
        by_row = np.array([_usage(line["chosen"], experts) for line in own])
        tasks = [line["task"] for line in own]
        steady = [set(now) == set(before) for line in own for before, now in pairwise(line["chosen"])]
        found[method] = {
            "usage": by_row.mean(0).tolist(),
            "tasks": {name: by_row[[task == name for task in tasks]].mean(0).tolist() for name in dict.fromkeys(tasks)},
            "steady": float(np.mean(steady)) if steady else None,
            "entropy": float(np.mean([line["entropy"] for line in own])),
        }
    return found


def _usage(chosen: Sequence[Sequence[int]], experts: int) -> list[float]:
    return [sum(expert in layer for layer in chosen) / len(chosen) for expert in range(experts)]


def tables(routers: Mapping[str, Json], routed: Mapping[str, Json]) -> list[str]:
    """Lines of Markdown; figures are percent."""
    if not routers:
        return []
    columns = ["prompt-level router", "experts", "pooling", "activation", "decision", "k", "right (valid)", "agreement"]
    lines = ["", *table_head(columns)]
    for label, own in routers.items():
        form = [own[key] for key in ("experts", "pooling", "activation", "decision", "top_k")]
        metrics = [percent(own["metrics"].get(key)) for key in ("accuracy", "agreement")]
        lines.append(table_row([label, *map(str, form), *metrics]))
    if routed:
        lines += ["", *table_head(["on test rows", "entropy", "as the layer before", "experts by use"])]
        for method, use in routed.items():
            names = routers.get(method.partition(", k = ")[0], {}).get("names", [])
            shares = sorted(enumerate(use["usage"]), key=lambda item: -item[1])
            shown = ", ".join(
                f"{names[expert] if expert < len(names) else expert} {percent(s)}" for expert, s in shares
            )
            lines.append(table_row([method, percent(use["entropy"]), percent(use["steady"]), shown]))
    return lines


def plots(routers: Mapping[str, Json]) -> dict[str, str]:
    """Right choices by layer and by number of layers that vote, and learned activations."""
    charts: dict[str, str] = {}
    for key, title in (("layer", "by layer"), ("depth", "of the vote of the first layers")):
        rows = {label: own["metrics"].get(f"accuracy_by_{key}") for label, own in routers.items()}
        found = {label: values for label, values in rows.items() if values and len(values) > 1}
        if found:
            longest = max(map(len, found.values()))
            positions = [str(layer + 1) if layer % 5 == 4 or not layer else "" for layer in range(longest)]
            charts[f"accuracy-by-{key}.svg"] = line_chart(f"Right adapter {title}, valid, %", positions, found)
    for label, own in routers.items():
        if own["curves"]:
            shown = np.linspace(0, len(own["curves"]) - 1, min(SHOWN_LAYERS, len(own["curves"]))).astype(int)
            curves = {f"layer {layer}": own["curves"][layer] for layer in dict.fromkeys(shown.tolist())}
            name = re.sub("[^a-z0-9]+", "-", label.lower()).strip("-")
            charts[f"activation-{name}.svg"] = curve_chart(f"Learned activations, {label}", CURVE, curves)
    return charts
