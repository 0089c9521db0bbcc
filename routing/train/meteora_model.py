"""A base model with all adapters of a token-level router embedded: what its training needs, loaded and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters_store.linear_names import Module, module_path
from adapters_store.types import LinearShape
from routing.card_adapters import CardAdapter
from routing.train.adapter import check_device, load_causal
from routing.train.data import Task
from routing.train.fused_norm import fuse_norms
from routing.train.gate_tally import GateTally
from routing.train.gated_linear import GateChoice, GatedLinear, embed_adapters
from routing.train.meteora_recipe import MeteoraRecipe
from routing.train.task_adapters import model_config, named_adapters, read_adapters, row_labels
from routing.train.trained_adapters import Experts, factor_weights


@dataclass(frozen=True, slots=True)
class GatedModel:
    """The model in fp32 with a gate in every adapted linear, all frozen but the gates and jointly trained adapters.

    `adapters` are in the order of the gates' rows; `labels` is the row of every task's own adapter, that of "no
    adapter" for tasks without one.
    """

    causal: Any
    tokenizer: Any
    shape: LinearShape
    fingerprint: str
    adapters: tuple[CardAdapter, ...]
    labels: tuple[int, ...]
    linears: Mapping[Module, GatedLinear]
    tally: GateTally

    @property
    def gates(self) -> dict[str, torch.nn.Parameter]:
        """By the names of a router's folder."""
        return {f"{module_path(*module)}.gate": linear.gate for module, linear in self.linears.items()}

    @property
    def experts(self) -> Experts:
        """The factors of all adapters, by linear."""
        return {module: linear.experts for module, linear in self.linears.items()}

    @property
    def weights(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by name."""
        every = {**self.gates, **factor_weights(self.experts)}
        return {name: weight for name, weight in every.items() if weight.requires_grad}

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
    named = named_adapters(tasks, adapters, recipe.null)
    recipe.check(len(named) + recipe.null)
    check_device(device)
    config = model_config(model_folder)
    files = read_adapters(named, adapters, config)
    causal, tokenizer = load_causal(model_folder)
    causal.to(device).eval()
    fuse_norms(causal)
    tally = GateTally()
    weights = [file.weights for file in files.values()]
    choice = GateChoice(recipe.top_k, recipe.temperature)
    linears = embed_adapters(causal, weights, recipe.null, choice, tally, trainable=recipe.joint)
    return GatedModel(
        causal=causal,
        tokenizer=tokenizer,
        shape=config.linear_shape,
        fingerprint=config.fingerprint(),
        adapters=tuple(CardAdapter(name, file.digest) for name, file in files.items()),
        labels=row_labels(tasks, named),
        linears=linears,
        tally=tally,
    )
