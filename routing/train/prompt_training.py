"""What the training of both kinds of prompt-level routers has in common: rows, optimiser, record and card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from routing.prompt_folder import PromptCard
from routing.train.batches import Example, encode
from routing.train.data import Task, TaskDataError, TaskRow
from routing.train.fitting import Fit
from routing.train.prompt_model import PromptModel
from routing.train.prompt_recipe import MiloraRecipe, MoaRecipe
from routing.train.router_recipe import RouterRun

CHECKPOINT = "checkpoint.safetensors"
Recipe = MoaRecipe | MiloraRecipe


@dataclass(frozen=True, slots=True)
class PromptResult:
    """What training made: the folder, its card, the losses of each step of this run, the total first, seconds."""

    folder: Path
    card: PromptCard
    losses: tuple[tuple[float, ...], ...] = field(repr=False)
    seconds: float


def encoded(model: PromptModel, split: str, tasks: Sequence[Sequence[TaskRow]], max_length: int) -> list[list[Example]]:
    """Tokens of each task's rows. Raises TaskDataError for a row that is too long."""
    try:
        return [encode(model.tokenizer, rows, max_length) for rows in tasks]
    except TaskDataError as error:
        raise TaskDataError(f"split {split}, {error}") from error


def make_optimizer(model: PromptModel, recipe: Recipe, coefficients_rate: float = 0.0) -> torch.optim.AdamW:
    """Routers, experts and activations' coefficients at their own peak rates; coefficients do not decay."""
    peaks = {
        "routers": (recipe.router_rate, recipe.weight_decay),
        "experts": (recipe.adapter_rate, recipe.weight_decay),
        "coefficients": (coefficients_rate, 0.0),
    }
    members: dict[str, list[torch.nn.Parameter]] = {kind: [] for kind in peaks}
    for name, weight in model.weights.items():
        members[_kind(name)].append(weight)
    groups = [{"params": members[kind], "peak": peak, "weight_decay": decay} for kind, (peak, decay) in peaks.items()]
    return torch.optim.AdamW([group for group in groups if group["params"]])


def coefficients(model: PromptModel) -> list[torch.nn.Parameter]:
    """Of the routers' rational activations, as far as they are trained."""
    return [weight for name, weight in model.weights.items() if _kind(name) == "coefficients"]


def _kind(name: str) -> str:
    if not name.startswith("layers."):
        return "experts"
    return "coefficients" if name.endswith((".a", ".b")) else "routers"


def fit_settings(
    kind: str,
    model: PromptModel,
    tasks: Sequence[Task],
    recipe: Recipe,
    run: RouterRun,
    out: Path,
    names: tuple[str, ...],
) -> Fit:
    """Of the loop; its identity is everything that decides the weights."""
    adapters = [asdict(adapter) for adapter in model.adapters]
    rows = [[task.name, [asdict(row) for row in task.train]] for task in tasks]
    content = json.dumps([kind, model.fingerprint, adapters, asdict(recipe), rows], sort_keys=True)
    identity = hashlib.sha256(content.encode()).hexdigest()
    return Fit(
        recipe.steps, recipe.share, recipe.gradient_clip, out / CHECKPOINT, run.checkpoint_every, identity, names
    )


def training_record(
    tasks: Sequence[Task],
    adapters: Mapping[str, Path],
    recipe: Recipe,
    names: Sequence[str],
    losses: Sequence[tuple[float, ...]],
) -> dict[str, Any]:
    """The card's `training`, without metrics."""
    return {
        "recipe": asdict(recipe),
        "tasks": [task.name for task in tasks],
        "null_tasks": [task.name for task in tasks if recipe.null and task.name not in adapters],
        "rows": sum(len(task.train) for task in tasks),
        "final_losses": {name: round(loss, 4) for name, loss in zip(names, losses[-1], strict=True)},
    }


def make_card(kind: str, model: PromptModel, recipe: Recipe, run: RouterRun, training: Mapping[str, Any]) -> PromptCard:
    """With the model's adapters; its digest is still to come."""
    return PromptCard(
        kind=kind,
        base_fingerprint=model.fingerprint,
        base_name=run.base_name,
        adapters=model.adapters,
        form=model.routers.form,
        has_null=recipe.null,
        sha256="",
        name=run.name,
        training=training,
    )
