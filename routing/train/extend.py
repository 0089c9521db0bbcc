"""Lets an adapter join a trained token-level router without training it again, by a row fitted to some samples:

python -m routing.train.extend --router DIR --add NAME --model DIR --tasks ROOT --adapters DIR --out DIR
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters_store.linear_names import Module
from adapters_store.peft_format import CONFIG_NAME, AdapterFile, read_adapter
from adapters_store.types import AdapterError
from routing.card_adapters import MAX_ADAPTERS, CardAdapter
from routing.card_file import RouterFolderError
from routing.gate_folder import GateCard, load_gates, read_gates, write_gates
from routing.train.adapter import TrainError, check_out, load_causal
from routing.train.data import Task, TaskDataError, read_tasks
from routing.train.joined_row import ExtendRecipe, SampledModel, extended_gates, row_metrics
from routing.train.row_fit import RIDGE
from server.model.config import ModelConfig, ModelError


@dataclass(frozen=True, slots=True)
class ExtendResult:
    """The new router's folder and card; `metrics` as `training.added` has them."""

    folder: Path
    card: GateCard
    seconds: float


def extend_router(
    router: Path,
    new: str,
    model_folder: Path,
    tasks: Sequence[Task],
    adapters: Mapping[str, Path],
    out: Path,
    recipe: ExtendRecipe | None = None,
    name: str | None = None,
) -> ExtendResult:
    """Writes into `out` the router with a row for the adapter `new`, in place of the one of this name if there is one.

    Tasks without an adapter stand for the row of "no adapter", if the router has one. No other row changes.

    Args:
        adapters: PEFT folders by name, of the new one and all of the router, which must be those it was trained for.

    Raises:
        TrainError: the model, an adapter, the task of the new one or another one is missing, or does not fit.
        TaskDataError: a row is longer than the recipe allows.
        RouterFolderError: the router cannot be read, or belongs to another model.
    """
    recipe, started = recipe or ExtendRecipe(), time.perf_counter()
    recipe.check()
    check_out(out)
    given = _given(router, new, model_folder, tasks, adapters)
    causal, tokenizer = load_causal(model_folder)
    causal.to(recipe.device).eval().requires_grad_(False)
    world = SampledModel(causal, tokenizer, given.labels, given.read, given.card)
    gates = {module: gate.to(recipe.device) for module, gate in given.gates.items()}
    seen = [task for task in tasks if task.name in given.labels]
    rows = {task.name: task.train[: recipe.samples if task.name == new else recipe.others] for task in seen}
    extended = extended_gates(world, gates, new, given.place, rows, recipe)
    fitted = {"samples": len(rows[new]), "others": recipe.others, "ridge": recipe.ridge, "rounds": recipe.rounds}
    added: dict[str, Any] = {"name": new, **fitted}
    if recipe.evaluation_rows:
        held_out = {task.name: task.valid[: recipe.evaluation_rows] for task in seen}
        added["metrics"] = row_metrics(world, gates, extended, new, given.place, held_out, recipe)
    written = write_gates(out, given.changed_card(added, name), extended)
    return ExtendResult(out, written, time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class _Given:
    """A router's card, and its gates without a row of the new adapter, whose row will be `place`.

    `read` are all adapters in the order of the new rows, `labels` the row of each task that is looked at.
    """

    card: GateCard
    gates: Mapping[Module, Tensor]
    place: int
    read: Mapping[str, AdapterFile]
    labels: Mapping[str, int]

    def changed_card(self, added: Mapping[str, Any], name: str | None) -> GateCard:
        """Of the router with the new row, about which `added` tells."""
        adapters = tuple(CardAdapter(each, file.digest) for each, file in self.read.items())
        training = {**self.card.training, "added": [*self.card.training.get("added", ()), added]}
        return replace(self.card, adapters=adapters, training=training, name=name or self.card.name)


def _given(router: Path, new: str, model_folder: Path, tasks: Sequence[Task], adapters: Mapping[str, Path]) -> _Given:
    """Everything that is read, and checked to fit together. Raises as `extend_router`."""
    try:
        config = ModelConfig.from_folder(model_folder)
    except ModelError as error:
        raise TrainError(str(error)) from error
    card = read_gates(router, config.linear_shape, config.fingerprint())
    gates = load_gates(router, config.linear_shape)
    place = _place(card, new)
    others = [adapter for adapter in card.adapters if adapter.name != new]
    if len(others) + card.has_null < 2:
        raise TrainError(f"{router}: one row beside that of {new}, expected at least two, whose distance is measured")
    if len(others) < len(card.adapters):
        gates = {module: torch.cat([gate[:place], gate[place + 1 :]]) for module, gate in gates.items()}
    names = [adapter.name for adapter in others]
    if missing := [name for name in (*names, new) if name not in adapters]:
        raise TrainError(f"adapter {missing[0]}: expected its folder, and a task of its name with rows of what it does")
    read = {name: _read(adapters[name], config) for name in (*names[:place], new, *names[place:])}
    labels = _labels(tasks, adapters, read, others, new, card.has_null)
    if strange := {target for _, target in read[new].weights.pairs} - set(card.targets):
        raise TrainError(f"adapter {new}: it touches {min(strange)}, where the router has no gates")
    return _Given(card, gates, place, read, labels)


def adapters_in(root: Path) -> dict[str, Path]:
    """The PEFT folders under `root`, by name."""
    return {path.parent.name: path.parent for path in sorted(root.glob(f"*/{CONFIG_NAME}"))}


def _place(card: GateCard, new: str) -> int:
    names = [adapter.name for adapter in card.adapters]
    if new not in names and len(names) == MAX_ADAPTERS:
        raise TrainError(f"the router has {MAX_ADAPTERS} adapters, the most that there may be")
    return names.index(new) if new in names else len(names)


def _read(folder: Path, config: ModelConfig) -> AdapterFile:
    try:
        return read_adapter(folder, config.linear_shape)
    except AdapterError as error:
        raise TrainError(f"{folder}: {error.message}") from error


def _labels(
    tasks: Sequence[Task],
    adapters: Mapping[str, Path],
    read: Mapping[str, AdapterFile],
    others: Sequence[CardAdapter],
    new: str,
    has_null: bool,
) -> dict[str, int]:
    """The row of each task that is looked at, among the gates with the new one. Raises TrainError."""
    for adapter in others:
        if read[adapter.name].digest != adapter.digest:
            raise TrainError(f"adapter {adapter.name}: its weights are not those that the router was trained for")
    rows = {name: row for row, name in enumerate(read)}
    found = {task.name: rows[task.name] for task in tasks if task.name in rows}
    if new not in found:
        raise TrainError(f"adapter {new}: expected its folder, and a task of its name with rows of what it does")
    if has_null:
        found |= {task.name: len(read) for task in tasks if task.name not in adapters}
    if len(found) < 2:
        raise TrainError("tasks: expected one of another adapter of the router, to fit the new row beside it")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Prints the metrics as JSON, then the folder. Exit code 0 done, 2 it cannot be done."""
    asked = _parser().parse_args(arguments)
    recipe = ExtendRecipe(asked.samples, asked.others, asked.ridge, device=asked.device)
    try:
        adapters = adapters_in(asked.adapters)
        result = extend_router(
            asked.router, asked.add, asked.model, read_tasks(asked.tasks), adapters, asked.out, recipe
        )
    except (RouterFolderError, TaskDataError, TrainError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    shown = {"seconds": round(result.seconds, 1), **result.card.training["added"][-1].get("metrics", {})}
    sys.stdout.write(f"{json.dumps(shown)}\n{result.folder}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").split(":")[0]
    parser = argparse.ArgumentParser(prog="python -m routing.train.extend", description=about)
    parser.add_argument("--router", type=Path, required=True, help="folder of the trained router")
    parser.add_argument("--add", required=True, metavar="NAME", help="the adapter's name, and its task's")
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--tasks", type=Path, required=True, help="folder of task folders")
    parser.add_argument("--adapters", type=Path, required=True, help="folder of PEFT folders by task")
    parser.add_argument("--out", type=Path, required=True, help="folder that the new router is written to")
    parser.add_argument("--samples", type=int, default=20, help="rows of the new task [20]")
    parser.add_argument("--others", type=int, default=8, help="rows of each other task [8]")
    parser.add_argument("--ridge", type=float, default=RIDGE, help=f"[{RIDGE}]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser


if __name__ == "__main__":
    sys.exit(main())
