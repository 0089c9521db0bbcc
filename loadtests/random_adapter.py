"""Adapters made up for a measurement."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCK = {target: "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn" for target in TARGETS}


@dataclass(frozen=True)
class LinearSizes:
    """(in, out) features of the seven linears of a Llama-like model, and its layers; from its `config.json`."""

    layers: int
    features: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, model: Path) -> "LinearSizes":
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
        head = config.get("head_dim") or hidden // heads
        query, key = heads * head, config.get("num_key_value_heads", heads) * head
        features = {"q_proj": (hidden, query), "k_proj": (hidden, key), "v_proj": (hidden, key)}
        features |= {"o_proj": (query, hidden), "gate_proj": (hidden, inner), "up_proj": (hidden, inner)}
        return cls(config["num_hidden_layers"], features | {"down_proj": (inner, hidden)})


def write_adapter(
    folder: Path,
    sizes: LinearSizes,
    rank: int,
    seed: int,
    targets: Sequence[str] = TARGETS,
    layers: int | None = None,
    scale: float = 0.01,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A PEFT folder of normal random factors of deviation `scale`, on the first `layers` layers (None: all)."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(sizes.layers if layers is None else layers):
        for target in targets:
            inputs, outputs = sizes.features[target]
            name = f"base_model.model.model.layers.{layer}.{BLOCK[target]}.{target}"
            tensors[f"{name}.lora_A.weight"] = (scale * torch.randn(rank, inputs, generator=generator)).to(dtype)
            tensors[f"{name}.lora_B.weight"] = (scale * torch.randn(outputs, rank, generator=generator)).to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0}
    config |= {"bias": "none", "target_modules": list(targets)}
    if layers is not None:
        config["layers_to_transform"] = list(range(layers))
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
