"""Lets an adapter join a trained token-level router without training it again, by a row fitted to some samples:

python -m routing.train.extend --router DIR --add NAME --model DIR --tasks ROOT --adapters DIR --out DIR
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters_store.linear_names import Module
from adapters_store.peft_format import AdapterFile, read_adapter
from adapters_store.types import GROUP_OF, AdapterError
from routing.card_adapters import MAX_ADAPTERS, CardAdapter
from routing.card_file import RouterFolderError
from routing.gate_folder import GateCard, load_gates, read_gates, write_gates
from routing.train.adapter import TrainError, check_device, check_out, load_causal
from routing.train.batches import Example, encode
from routing.train.data import Task, TaskDataError, read_tasks
from routing.train.one_adapter import show_inputs
from routing.train.row_fit import RIDGE, RowFit, hits
from server.model.config import ModelConfig, ModelError

BATCH_ROWS = 16


@dataclass(frozen=True, slots=True)
class ExtendRecipe:
    """How a row is fitted: to `samples` training rows of the new adapter's task and `others` of each other task."""

    samples: int = 20
    others: int = 8
    ridge: float = RIDGE
    max_length: int = 512
    evaluation_rows: int = 10
    device: str = "cpu"

    def check(self) -> None:
        """Raise TrainError for the first field that cannot be."""
        for name in ("samples", "others"):
            if getattr(self, name) < 1:
                raise TrainError(f"{name} {getattr(self, name)}: expected a whole number of at least 1")
        if not self.ridge > 0:
            raise TrainError(f"ridge {self.ridge}: expected a number above 0")
        check_device(self.device)


@dataclass(frozen=True, slots=True)
class ExtendResult:
    """The new router's folder and card; `metrics` as `training.added` has them."""

    folder: Path
    card: GateCard
    seconds: float


@dataclass(frozen=True)
class _World:
    """The model, the tasks with the row of the new gates that stands for each, and their adapters."""

    causal: Any
    tokenizer: Any
    labels: Mapping[str, int]
    adapters: Mapping[str, AdapterFile]

    def passes(self, rows: Mapping[str, Sequence[Any]], max_length: int) -> Iterator[tuple[str, list[Example]]]:
        """Batches of tasks' rows."""
        for name, own in rows.items():
            examples = encode(self.tokenizer, own, max_length)
            for first in range(0, len(examples), BATCH_ROWS):
                yield name, examples[first : first + BATCH_ROWS]


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

    Every task's samples pass the model under the task's own adapter. Tasks without an adapter stand for the row of "no
    adapter", if the router has one; adapters of the router that no task is given for keep their rows and are not
    looked at. No other row changes.

    Args:
        adapters: PEFT folders by the names of the tasks; those of the router must be the ones it was trained for.

    Raises:
        TrainError: the model, an adapter, the task of the new one or another one is missing, or does not fit.
        TaskDataError: a row is longer than the recipe allows.
        RouterFolderError: the router cannot be read, or belongs to another model.
    """
    recipe, started = recipe or ExtendRecipe(), time.perf_counter()
    recipe.check()
    check_out(out)
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
    read = {task.name: _read(adapters[task.name], config) for task in tasks if task.name in adapters}
    labels = _labels(tasks, read, others, new, place, card.has_null)
    if strange := {target for _, target in read[new].weights.pairs} - set(card.targets):
        raise TrainError(f"adapter {new}: it touches {min(strange)}, where the router has no gates")
    causal, tokenizer = load_causal(model_folder)
    causal.to(recipe.device).eval().requires_grad_(False)
    world = _World(causal, tokenizer, labels, read)
    gates = {module: gate.to(recipe.device) for module, gate in gates.items()}
    rows = {
        task.name: task.train[: recipe.samples if task.name == new else recipe.others]
        for task in tasks
        if task.name in labels
    }
    extended = _extended(world, gates, new, place, rows, recipe)
    held_out = {task.name: task.valid[: recipe.evaluation_rows] for task in tasks if task.name in labels}
    added = {"name": new, "samples": len(rows[new]), "others": recipe.others, "ridge": recipe.ridge}
    if recipe.evaluation_rows:
        added["metrics"] = _metrics(world, gates, extended, new, place, held_out, recipe)
    digests = [*others[:place], CardAdapter(new, read[new].digest), *others[place:]]
    training = {**card.training, "added": [*card.training.get("added", ()), added]}
    changed = replace(card, adapters=tuple(digests), training=training, name=name or card.name)
    written = write_gates(out, changed, extended)
    return ExtendResult(out, written, time.perf_counter() - started)


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
    read: Mapping[str, AdapterFile],
    others: Sequence[CardAdapter],
    new: str,
    place: int,
    has_null: bool,
) -> dict[str, int]:
    """The row of each task that is looked at, among the gates with the new one. Raises TrainError."""
    if new not in read:
        raise TrainError(f"adapter {new}: expected its folder, and a task of its name with rows of what it does")
    rows = {adapter.name: row + (row >= place) for row, adapter in enumerate(others)}
    for adapter in others:
        if adapter.name in read and read[adapter.name].digest != adapter.digest:
            raise TrainError(f"adapter {adapter.name}: its weights are not those that the router was trained for")
    found = {new: place}
    for task in tasks:
        if task.name in rows and task.name in read:
            found[task.name] = rows[task.name]
        elif has_null and task.name not in read:
            found[task.name] = len(others) + 1
    if len(found) < 2:
        raise TrainError("tasks: expected one of another adapter of the router, to fit the new row beside it")
    return found


def _extended(
    world: _World,
    gates: Mapping[Module, Tensor],
    new: str,
    place: int,
    rows: Mapping[str, Sequence[Any]],
    recipe: ExtendRecipe,
) -> dict[Module, Tensor]:
    shared = _shared(gates)
    fits = {first: RowFit(torch.stack([gates[module] for module in own])) for first, own in shared.items()}

    def adds(name: str) -> Any:
        label = world.labels[name]
        row = None if name == new else label - (label > place)  # among the gates without the new one
        return lambda module, x: fits[module].add(x, row)

    for name, examples in world.passes(rows, recipe.max_length):
        weights = world.adapters[name].weights if name in world.adapters else None
        show_inputs(world.causal, list(shared), weights, examples, world.tokenizer.pad_token_id, adds(name))
    found = {}
    for first, own in shared.items():
        for module, row in zip(own, fits[first].rows(recipe.ridge), strict=True):
            gate = gates[module]
            found[module] = torch.cat([gate[:place], row[None], gate[place:]])
    if not all(bool(torch.isfinite(gate).all()) for gate in found.values()):
        raise TrainError(f"adapter {new}: its row is not finite, expected a larger ridge than {recipe.ridge}")
    return {module: found[module] for module in gates}


def _shared(gates: Mapping[Module, Tensor]) -> dict[Module, list[Module]]:
    """The gated linears that share an input, by the first of them."""
    groups: dict[tuple[int, str], list[Module]] = {}
    for layer, target in gates:
        groups.setdefault((layer, GROUP_OF[target].name), []).append((layer, target))
    return {own[0]: own for own in groups.values()}


def _metrics(
    world: _World,
    before: Mapping[Module, Tensor],
    after: Mapping[Module, Tensor],
    new: str,
    place: int,
    rows: Mapping[str, Sequence[Any]],
    recipe: ExtendRecipe,
) -> dict[str, float]:
    """How often the highest logit is that of the own row, over all gates and tokens of validation rows.

    Of the `new` adapter's and of `others`, and of these `before` there was the row; with `_answer` of the tokens that
    predict an answer's. Every task passes the model under its own adapter.
    """
    shared = _shared(after)
    found: dict[str, list[Tensor]] = {}

    def adds(label: int, into: dict[str, Tensor]) -> Any:
        def add(module: Module, x: Tensor) -> None:
            for key, gates, row in (("after", after, label), ("before", before, label - (label > place))):
                own = hits([gates[each] for each in shared[module]], x, row) * len(shared[module])
                into[key] = own if key not in into else into[key] + own

        return add

    for name, examples in world.passes(rows, recipe.max_length):
        sums: dict[str, Tensor] = {}
        weights = world.adapters[name].weights if name in world.adapters else None
        pad, tell = world.tokenizer.pad_token_id, adds(world.labels[name], sums)
        answers = show_inputs(world.causal, list(shared), weights, examples, pad, tell)
        for key in ("after",) if name == new else ("after", "before"):
            what = "new" if name == new else "others" if key == "after" else "others_before"
            found.setdefault(what, []).append(sums[key] / len(after))
            found.setdefault(f"{what}_answer", []).append(sums[key][answers] / len(after))
    return {what: round(float(torch.cat(parts).mean()), 4) for what, parts in sorted(found.items())}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Prints the metrics as JSON, then the folder. Exit code 0 done, 2 it cannot be done."""
    asked = _parser().parse_args(arguments)
    recipe = ExtendRecipe(asked.samples, asked.others, asked.ridge, device=asked.device)
    try:
        tasks = read_tasks(asked.tasks)
        adapters = {task.name: asked.adapters / task.name for task in tasks if (asked.adapters / task.name).is_dir()}
        result = extend_router(asked.router, asked.add, asked.model, tasks, adapters, asked.out, recipe)
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
