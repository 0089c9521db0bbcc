"""A tiny model's shape, and PEFT folders that fit it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapters_store.types import LinearShape

Writer = Callable[..., Path]


@pytest.fixture
def shape() -> LinearShape:
    """Two layers: 16 hidden, 8 key/value, 24 feed-forward features."""
    inputs = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 16) | {"down_proj": 24}
    outputs = {"q_proj": 16, "k_proj": 8, "v_proj": 8, "o_proj": 16, "gate_proj": 24, "up_proj": 24, "down_proj": 16}
    return LinearShape(2, inputs, outputs)


@pytest.fixture
def config() -> dict[str, Any]:
    """The config of a rank-4 adapter on q_proj and down_proj."""
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "bias": "none"}


@pytest.fixture
def tensors(shape: LinearShape) -> dict[str, torch.Tensor]:
    """The tensors that go with `config`, under PEFT's names."""
    generator = torch.Generator().manual_seed(0)
    result: dict[str, torch.Tensor] = {}
    for layer in range(shape.num_layers):
        for block, target in (("self_attn", "q_proj"), ("mlp", "down_proj")):
            prefix = f"base_model.model.model.layers.{layer}.{block}.{target}"
            result[f"{prefix}.lora_A.weight"] = torch.randn(4, shape.inputs[target], generator=generator)
            result[f"{prefix}.lora_B.weight"] = torch.randn(shape.outputs[target], 4, generator=generator)
    return result


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Writes a folder of the given name with this config and these tensors, and returns it."""

    def write_folder(config: dict[str, Any], tensors: dict[str, torch.Tensor], name: str = "adapter") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return write_folder
