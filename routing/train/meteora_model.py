"""A base model with all adapters of a token-level router embedded: what its training needs, loaded and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters_store.linear_names import Module, module_path
from routing.gate_folder import GateCard
from routing.train.batches import encode
from routing.train.data import Task
from routing.train.gate_basis import ROWS, white_bases
from routing.train.gate_tally import GateTally
from routing.train.gated_linear import GateChoice, GatedLinear, embed_adapters, gated_modules
from routing.train.meteora_recipe import MeteoraRecipe
from routing.train.router_model import GivenAdapters, RouterModel, given_adapters, load_frozen
from routing.train.router_recipe import RouterRecipe, RouterRun
from routing.train.trained_adapters import Experts, factor_weights


@dataclass(frozen=True, slots=True)
class GatedModel(RouterModel):
    """A model with a gate in every adapted linear, all frozen but the gates and jointly trained adapters."""

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

    def card(
        self, recipe: RouterRecipe, run: RouterRun, training: Mapping[str, Any], temperature: float = 1.0
    ) -> GateCard:
        """Of the router that is trained; its digest is still to come."""
        return GateCard(
            base_fingerprint=self.fingerprint,
            base_name=run.base_name,
            adapters=self.adapters,
            targets=self.targets,
            top_k=recipe.top_k,
            temperature=temperature,
            has_null=recipe.null,
            sha256="",
            name=run.name,
            training=training,
        )

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
        TaskDataError: a row is longer than the recipe allows.
    """
    given = given_adapters(model_folder, tasks, adapters, recipe, device)
    causal, tokenizer = load_frozen(model_folder, device)
    tally = GateTally()
    weights = [file.weights for file in given.files.values()]
    choice = GateChoice(recipe.top_k, recipe.temperature)
    bases = _bases(causal, tokenizer, tasks, given, recipe) if recipe.white else None
    linears = embed_adapters(causal, weights, recipe.null, choice, tally, trainable=recipe.joint, bases=bases)
    config = given.config
    return GatedModel(
        causal, tokenizer, config.linear_shape, config.fingerprint(), given.cards, given.labels, linears, tally
    )


def _bases(
    causal: Any, tokenizer: Any, tasks: Sequence[Task], given: GivenAdapters, recipe: MeteoraRecipe
) -> dict[Module, Tensor]:
    """Of some training rows of each task under its own adapter. Raises TaskDataError for a row that is too long."""
    weights = {name: file.weights for name, file in given.files.items()}
    rows = [encode(tokenizer, task.train[:ROWS], recipe.max_length) for task in tasks]
    samples = [(weights.get(task.name), own) for task, own in zip(tasks, rows, strict=True)]
    modules = gated_modules(causal, list(weights.values()))
    return white_bases(causal, tokenizer.pad_token_id, modules, samples)
