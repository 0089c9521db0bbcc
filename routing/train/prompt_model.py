"""A base model with prompt-level routers, and the experts they choose from: what their training needs, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters_store.linear_names import Module
from adapters_store.types import TARGETS, LinearShape, LoraPair
from routing.train.adapter import TrainError, check_device
from routing.train.data import Task
from routing.train.layer_routers import LayerRouters, RoutedLinear, embed_experts, fresh_routers, router_weights
from routing.train.prompt_recipe import MiloraRecipe, MoaRecipe
from routing.train.router_model import RouterModel, given_adapters, load_frozen
from routing.train.task_adapters import check_names, model_config
from routing.train.trained_adapters import Experts, factor_weights, fresh_pair

Pairs = dict[Module, dict[int, LoraPair]]
"""Factors by linear and expert."""


@dataclass(frozen=True, slots=True)
class PromptModel(RouterModel):
    """A model of which only the routers are trained and, where they are trained too, the experts.

    `linears` are those on which experts act; empty if none needs to act in training.
    """

    routers: LayerRouters
    linears: Mapping[Module, RoutedLinear]

    @property
    def experts(self) -> Experts:
        """The factors of all experts, by linear."""
        return {module: linear.experts for module, linear in self.linears.items()}

    @property
    def weights(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by name: routers, then experts."""
        every = {**router_weights(self.routers.routers), **factor_weights(self.experts)}
        return {name: weight for name, weight in every.items() if weight.requires_grad}


def load_over_adapters(
    model_folder: Path,
    tasks: Sequence[Task],
    adapters: Mapping[str, Path],
    recipe: MoaRecipe | MiloraRecipe,
    device: str,
    *,
    spread: float,
    acting: bool,
    trainable: bool = False,
) -> PromptModel:
    """Loads the model and, if they are `acting`, embeds the adapters of `tasks`, by the tasks' names.

    spread: of the routers' first matrices (`fresh_routers`). trainable: the adapters, too.

    Raises:
        TrainError: model, device, chat template or an adapter is missing or does not fit, or the recipe cannot be.
    """
    given = given_adapters(model_folder, tasks, adapters, recipe, device)
    pairs: Pairs = {}
    for expert, file in enumerate(given.files.values()):
        for module, pair in file.weights.pairs.items() if acting else ():
            pairs.setdefault(module, {})[expert] = pair
    causal, tokenizer = load_frozen(model_folder, device)
    shape, experts = given.config.linear_shape, len(given.files) + recipe.null
    routers = _routers(causal, recipe, shape, experts, spread, device)
    linears = embed_experts(causal, pairs, experts, routers, trainable=trainable)
    return PromptModel(
        causal, tokenizer, shape, given.config.fingerprint(), given.cards, given.labels, routers, linears
    )


def load_over_modules(
    model_folder: Path, tasks: Sequence[Task], recipe: MiloraRecipe, device: str, *, spread: float
) -> PromptModel:
    """Loads the model and gives all seven linears of every layer a fresh LoRA, each an expert of its layer.

    Raises:
        TrainError: model, device or chat template is missing, a task comes twice, or the recipe cannot be.
    """
    check_names(tasks)
    recipe.check(len(TARGETS))
    check_device(device)
    config = model_config(model_folder)
    shape = config.linear_shape
    generator = torch.Generator().manual_seed(recipe.seed + 1)  # on the CPU: the same on every device
    pairs: Pairs = {}
    for layer in range(shape.num_layers):
        for expert, target in enumerate(TARGETS):
            sizes = shape.inputs[target], shape.outputs[target]
            pairs[layer, target] = {expert: fresh_pair(*sizes, recipe.rank, recipe.alpha, generator)}
    causal, tokenizer = load_frozen(model_folder, device)
    routers = _routers(causal, recipe, shape, len(TARGETS), spread, device)
    linears = embed_experts(causal, pairs, len(TARGETS), routers, trainable=True)
    return PromptModel(causal, tokenizer, shape, config.fingerprint(), (), (), routers, linears)


def _routers(
    causal: Any, recipe: MoaRecipe | MiloraRecipe, shape: LinearShape, experts: int, spread: float, device: str
) -> LayerRouters:
    form = recipe.form(shape.num_layers, experts)
    if form.num_counted > shape.num_layers:
        raise TrainError(f"depth {form.depth}: expected at most {shape.num_layers}, the layers of the model")
    routers = fresh_routers(form, shape.inputs["q_proj"], device, spread, recipe.seed)
    return LayerRouters(form, routers, causal.base_model.layers)
