"""The base model of a router's training, with the adapters that it is trained over: loaded, checked and frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters_store.peft_format import AdapterFile
from adapters_store.types import LinearShape
from routing.card_adapters import CardAdapter
from routing.train.adapter import check_device, load_causal
from routing.train.data import Task
from routing.train.fused_norm import fuse_norms
from routing.train.router_recipe import RouterRecipe
from routing.train.task_adapters import model_config, named_adapters, read_adapters, row_labels
from server.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class RouterModel:
    """The model in fp32, frozen but for what a router's kind trains in it.

    `adapters` are in the order of the router's rows or experts; empty while there is none yet. `labels` is the row of
    every task's own adapter, that of "no adapter" for tasks without one; empty where tasks have none of their own.
    """

    causal: Any
    tokenizer: Any
    shape: LinearShape
    fingerprint: str
    adapters: tuple[CardAdapter, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GivenAdapters:
    """The model's config, the adapters' files by name in the tasks' order, and as cards and labels of a router."""

    config: ModelConfig
    files: Mapping[str, AdapterFile]
    labels: tuple[int, ...]

    @property
    def cards(self) -> tuple[CardAdapter, ...]:
        return tuple(CardAdapter(name, file.digest) for name, file in self.files.items())


def given_adapters(
    model_folder: Path,
    tasks: Sequence[Task],
    adapters: Mapping[str, Path],
    recipe: RouterRecipe,
    device: str,
) -> GivenAdapters:
    """Reads the adapters of `tasks`, of which `adapters` has the folders by the tasks' names.

    Raises:
        TrainError: model, device or an adapter is missing or does not fit, or the recipe cannot be.
    """
    named = named_adapters(tasks, adapters, recipe.null)
    recipe.check(len(named) + recipe.null)
    check_device(device)
    config = model_config(model_folder)
    return GivenAdapters(config, read_adapters(named, adapters, config), row_labels(tasks, named))


def load_frozen(model_folder: Path, device: str) -> tuple[Any, Any]:
    """Model and tokenizer. Raises TrainError for a model or chat template that is missing."""
    causal, tokenizer = load_causal(model_folder)
    causal.to(device).eval().requires_grad_(False)
    fuse_norms(causal)
    return causal, tokenizer
