"""What the training of all routers inside the model has in common: rows, the loop's settings, and the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from routing.gate_folder import GateCard
from routing.prompt_folder import PromptCard
from routing.train.batches import Example, encode
from routing.train.data import Task, TaskDataError, TaskRow
from routing.train.fitting import Fit
from routing.train.router_model import RouterModel
from routing.train.router_recipe import RouterRecipe, RouterRun

CHECKPOINT = "checkpoint.safetensors"

Card = TypeVar("Card", GateCard, PromptCard)


@dataclass(frozen=True)  # with slots no alias of a generic class can make one
class RouterResult(Generic[Card]):
    """What training made: the folder, its card, the losses of each step of this run, seconds."""

    folder: Path
    card: Card
    losses: tuple[tuple[float, ...], ...] = field(repr=False)
    seconds: float


GateResult = RouterResult[GateCard]
PromptResult = RouterResult[PromptCard]


def encoded(model: RouterModel, split: str, tasks: Sequence[Sequence[TaskRow]], max_length: int) -> list[list[Example]]:
    """Tokens of each task's rows. Raises TaskDataError for a row that is too long."""
    try:
        return [encode(model.tokenizer, rows, max_length) for rows in tasks]
    except TaskDataError as error:
        raise TaskDataError(f"split {split}, {error}") from error


def fit_settings(
    kind: str,
    model: RouterModel,
    tasks: Sequence[Task],
    recipe: RouterRecipe,
    run: RouterRun,
    out: Path,
    names: tuple[str, ...],
) -> Fit:
    """Of the loop; its identity is everything that decides the weights. names: of the losses."""
    adapters = [asdict(adapter) for adapter in model.adapters]
    rows = [[task.name, [asdict(row) for row in task.train]] for task in tasks]
    content = json.dumps([kind, model.fingerprint, adapters, asdict(recipe), rows], sort_keys=True)
    identity = hashlib.sha256(content.encode()).hexdigest()
    checkpoint = out / CHECKPOINT
    return Fit(recipe.steps, recipe.share, recipe.gradient_clip, checkpoint, run.checkpoint_every, identity, names)


def training_record(
    tasks: Sequence[Task], adapters: Mapping[str, Path], recipe: RouterRecipe, losses: Mapping[str, Any]
) -> dict[str, Any]:
    """A card's `training`, without metrics. losses: the last ones, as the card has them."""
    return {
        "recipe": asdict(recipe),
        "tasks": [task.name for task in tasks],
        "null_tasks": [task.name for task in tasks if recipe.null and task.name not in adapters],
        "rows": sum(len(task.train) for task in tasks),
        **losses,
    }


def final_losses(names: Sequence[str], losses: Sequence[tuple[float, ...]]) -> dict[str, dict[str, float]]:
    """Of the last step: a mean over steps would differ in a run that was resumed."""
    return {"final_losses": {name: round(loss, 4) for name, loss in zip(names, losses[-1], strict=True)}}
