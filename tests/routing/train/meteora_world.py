"""Two toy tasks, and random adapters for them, as PEFT folders of the tiny chat model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from adapters_store.peft_write import write_peft
from adapters_store.types import AdapterWeights, LinearShape, LoraPair
from routing.train.data import Task, TaskRow
from server.model.config import ModelConfig


def toy_task(name: str, letters: str, rows: int = 12) -> Task:
    """Rows of a few letters that the other tasks do not use; the answer is the last one."""
    texts = [(letters * 3)[: 4 + number % 3] + letters * (number // 3) for number in range(rows)]
    found = [TaskRow(name, "toy", letters, text, letters[-1], 0) for text in texts]
    return Task(name, tuple(found[: rows - 4]), tuple(found[rows - 4 : rows - 2]), tuple(found[rows - 2 :]))


def write_adapter(
    folder: Path, model: Path, targets: Mapping[str, int], *, seed: int, scale: float = 2.0, layers: int = 2
) -> AdapterWeights:
    """A random adapter with a rank for each target, on the first `layers` layers."""
    shape: LinearShape = ModelConfig.from_folder(model).linear_shape
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> Tensor:
        return 0.2 * torch.randn(rows, columns, generator=generator)

    pairs = {
        (layer, target): LoraPair(draw(rank, shape.inputs[target]), draw(shape.outputs[target], rank), scale)
        for layer in range(layers)
        for target, rank in targets.items()
    }
    weights = AdapterWeights("", pairs)
    write_peft(folder, weights)
    return weights
