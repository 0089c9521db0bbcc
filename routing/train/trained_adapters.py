"""Adapters that were trained together with a router: rounded as they are stored, written as PEFT folders beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from adapters_store.linear_names import Module, module_path
from adapters_store.peft_format import read_adapter
from adapters_store.peft_write import write_peft
from adapters_store.types import AdapterWeights, LinearShape, LoraPair
from routing.card_adapters import CardAdapter
from routing.train.card import write_samples
from routing.train.data import Task
from routing.train.side_by_side import SideBySide

ADAPTERS_FOLDER = "adapters"
"""Below a router's folder: the adapters that were trained with it, one PEFT folder each."""

ADAPTER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""What the registry takes as a name; its own pattern comes with a database."""

Experts = Mapping[Module, SideBySide]
"""By (layer, target)."""


def fresh_pair(inputs: int, outputs: int, rank: int, alpha: float, generator: torch.Generator) -> LoraPair:
    """A LoRA that adds nothing yet: as in PEFT, A is uniform within 1 / sqrt(inputs) and B zero. fp32, on the CPU."""
    a = (2 * torch.rand(rank, inputs, generator=generator) - 1) / math.sqrt(inputs)
    return LoraPair(a, torch.zeros(outputs, rank), alpha / rank)


def factor_weights(experts: Experts) -> dict[str, torch.nn.Parameter]:
    """The factors by name, trained or not."""
    return {
        f"{module_path(*module)}.{name}": weight
        for module, own in experts.items()
        for name, weight in own.named_parameters()
    }


def round_experts(experts: Experts) -> None:
    """To bf16, in which they are stored; to be judged as they will be served."""
    with torch.no_grad():
        for weight in factor_weights(experts).values():
            weight.copy_(weight.bfloat16())


def write_experts(
    experts: Experts, shape: LinearShape, folder: Path, names: Mapping[str, Sequence[Task]], base_name: str
) -> tuple[CardAdapter, ...]:
    """Writes experts, in bf16, as PEFT folders below `folder`/adapters; returns them as a card names them.

    Args:
        names: of the adapters, in the experts' order, each with the tasks whose prompts are its samples. A single one
            has all experts.
    """
    found: list[CardAdapter] = []
    for expert, (name, tasks) in enumerate(names.items()):
        pairs: dict[Module, LoraPair] = {}
        for module, own in experts.items():
            for owner, pair in own.pairs(torch.bfloat16).items():
                if owner == expert or len(names) == 1:
                    pairs[module] = pair
        place = folder / ADAPTERS_FOLDER / name
        write_peft(place, AdapterWeights("", pairs), base_name)
        write_samples(place, [row for rows in zip(*(task.train for task in tasks), strict=False) for row in rows])
        found.append(CardAdapter(name, read_adapter(place, shape).digest))
    return tuple(found)
