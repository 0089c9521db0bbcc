"""What the training of both kinds of prompt-level routers has in common: optimiser and card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from routing.prompt_folder import PromptCard
from routing.train.prompt_model import PromptModel
from routing.train.prompt_recipe import MiloraRecipe, MoaRecipe
from routing.train.router_recipe import RouterRun

Recipe = MoaRecipe | MiloraRecipe


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
