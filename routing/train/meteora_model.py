"""A base model with all adapters of a token-level router embedded: what its training needs, loaded and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters_store.linear_names import Module, module_path
from adapters_store.peft_format import AdapterFile, read_adapter
from adapters_store.types import AdapterError
from routing.card_adapters import MAX_ADAPTERS, CardAdapter
from routing.train.adapter import TrainError, check_device, load_causal
from routing.train.data import Task
from routing.train.fused_norm import fuse_norms
from routing.train.gate_tally import GateTally
from routing.train.gated_linear import GateChoice, GatedLinear, embed_adapters
from routing.train.meteora_recipe import MeteoraRecipe
from server.model.config import ModelConfig, ModelError


@dataclass(frozen=True, slots=True)
class GatedModel:
    """The model in fp32 with a gate in every adapted linear, all frozen but the gates.

    `adapters` are in the order of the gates' rows; `labels` is the row of every task's own adapter, that of "no
    adapter" for tasks without one.
    """

    causal: Any
    tokenizer: Any
    fingerprint: str
    adapters: tuple[CardAdapter, ...]
    labels: tuple[int, ...]
    linears: Mapping[Module, GatedLinear]
    tally: GateTally

    @property
    def gates(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by the names of a router's folder."""
        return {f"{module_path(*module)}.gate": linear.gate for module, linear in self.linears.items()}

    @property
    def targets(self) -> tuple[str, ...]:
        """The linears of every layer that have a gate."""
        return tuple(target for layer, target in self.linears if layer == 0)


def load_gated_model(
    model_folder: Path, tasks: Sequence[Task], adapters: Mapping[str, Path], recipe: MeteoraRecipe, device: str
) -> GatedModel:
    """Loads the model and embeds the adapters of `tasks`, of which `adapters` has the folders by the tasks' names.

    Raises:
        TrainError: model, device, chat template or an adapter is missing or does not fit, or the recipe cannot be.
    """
    named = [task.name for task in tasks if task.name in adapters]
    _check(tasks, adapters, named, recipe, device)
    try:
        config = ModelConfig.from_folder(model_folder)
    except ModelError as error:
        raise TrainError(str(error)) from error
    files = {name: _adapter(name, adapters[name], config) for name in named}
    causal, tokenizer = load_causal(model_folder)
    causal.to(device).eval()
    fuse_norms(causal)
    tally = GateTally()
    weights = [file.weights for file in files.values()]
    linears = embed_adapters(causal, weights, recipe.null, GateChoice(recipe.top_k, recipe.temperature), tally)
    return GatedModel(
        causal=causal,
        tokenizer=tokenizer,
        fingerprint=config.fingerprint(),
        adapters=tuple(CardAdapter(name, file.digest) for name, file in files.items()),
        labels=tuple(named.index(task.name) if task.name in named else len(named) for task in tasks),
        linears=linears,
        tally=tally,
    )


def _check(
    tasks: Sequence[Task], adapters: Mapping[str, Path], named: Sequence[str], recipe: MeteoraRecipe, device: str
) -> None:
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise TrainError(f"task {twice}: comes twice, expected tasks of different names")
    if strangers := sorted(adapters.keys() - set(names)):
        raise TrainError(f"adapter {strangers[0]}: there is no task of this name, expected one for every adapter")
    lacking = [name for name in names if name not in adapters]
    if lacking and not recipe.null:
        raise TrainError(f"task {lacking[0]}: it has no adapter, expected one, or a row of the gates for no adapter")
    if recipe.null and not lacking:
        raise TrainError("null: every task has an adapter, expected a task without one that trains the gates' last row")
    if not 1 <= len(named) <= MAX_ADAPTERS or len(names) < 2:
        raise TrainError(
            f"{len(named)} adapters, {len(names)} tasks: expected 1 to {MAX_ADAPTERS} adapters and at least 2 tasks"
        )
    recipe.check(len(named))
    check_device(device)


def _adapter(name: str, folder: Path, config: ModelConfig) -> AdapterFile:
    try:
        return read_adapter(folder, config.linear_shape)
    except AdapterError as error:
        raise TrainError(f"adapter {name}, {folder}: {error.message}") from error
