"""Reading PEFT folders: what PEFT itself writes, and when two folders are the same adapter."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from adapters_store.linear_names import module_path
from adapters_store.peft_format import AdapterFile, most_frequent, read_adapter, read_layout, read_summary
from adapters_store.types import TARGETS, AdapterError, LinearShape
from tests.adapters_store.damage import Q_A, Q_B, Damage, change, drop, rename, retensor, set_value

Reread = Callable[[Damage], tuple[AdapterFile, AdapterFile]]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def saved_by_peft(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, LoraLayer]:
    """Make an adapter with random B's, save it, and give PEFT's own layers by module path."""
    model = get_peft_model(
        tiny_llama().to(dtype), LoraConfig(task_type="CAUSAL_LM", **options), autocast_adapter_dtype=False
    )
    layers = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            torch.nn.init.normal_(next(module.lora_B.parameters(), torch.empty(0)))  # an embedding's B is elsewhere
            layers[name] = module
    model.save_pretrained(folder)
    return layers


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear", "lora_dropout": 0.3},
        {"r": 4, "target_modules": list(TARGETS), "rank_pattern": {"q_proj": 8, "layers.1.mlp.down_proj": 20}},
        {
            "r": 4,
            "use_rslora": True,
            "target_modules": list(TARGETS),
            "rank_pattern": {r".*\.0\.self_attn\.(q|k)_proj": 2, "k_proj": 6},
            "alpha_pattern": {r"layers\.\d+\.mlp\..*": 3, "^model.layers.1.self_attn.o_proj": 32, "v_proj": 12},
        },
        {"r": 2, "target_modules": r".*\.1\.(mlp\.(up|gate)_proj|self_attn\.o_proj)"},
        {"r": 2, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": 1},
        {"r": 2, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {
            "r": 2,
            "target_modules": "all-linear",
            "exclude_modules": ["mlp.down_proj", "model.layers.0.self_attn.q_proj"],
        },
        {"r": 2, "target_modules": ["model.layers.0.self_attn.q_proj", "mlp.up_proj"], "init_lora_weights": "gaussian"},
        {"r": 4, "target_modules": ["q_proj", "gate_proj"], "dtype": torch.bfloat16},
        {"r": 4, "target_modules": ["k_proj"], "dtype": torch.float16},
    ],
)
def test_reads_what_peft_writes(tmp_path: Path, shape: LinearShape, options: dict[str, Any]) -> None:
    layers = saved_by_peft(tmp_path, **options)
    file = read_adapter(tmp_path, shape)
    assert {module_path(*module) for module in file.weights.pairs} == set(layers)
    for module, pair in file.weights.pairs.items():
        layer = layers[module_path(*module)]
        assert pair.scale == layer.scaling["default"]
        assert pair.rank == layer.r["default"]
        assert torch.equal(pair.a, layer.lora_A["default"].weight)
        assert torch.equal(pair.b, layer.lora_B["default"].weight)
        assert pair.a.dtype == options.get("dtype", torch.float32)
    assert file.modules == len(layers)
    assert file.rank == max(layer.r["default"] for layer in layers.values())
    assert file.alpha == most_frequent([layer.lora_alpha["default"] for layer in layers.values()])
    assert vars(read_summary(tmp_path, shape)) | {"weights": file.weights} == vars(file)
    assert read_layout(tmp_path, shape).group_ranks == file.weights.group_ranks
    assert file.targets == tuple(sorted({name.rpartition(".")[2] for name in layers}))
    assert file.num_bytes == sum(t.nbytes for t in load_file(tmp_path / "adapter_model.safetensors").values())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True, "target_modules": ["q_proj"]}, "DoRA"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "pissa"),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, "bias"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, about biases and tied embeddings
def test_refuses_by_name_what_peft_writes_beyond_lora(
    tmp_path: Path, shape: LinearShape, options: dict[str, Any], named: str
) -> None:
    saved_by_peft(tmp_path, **options)
    with pytest.raises(AdapterError, match=named) as caught:
        read_adapter(tmp_path, shape)
    assert (caught.value.code, caught.value.status) == ("adapter_unsupported", 422)


@pytest.fixture
def reread(write: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor], shape: LinearShape) -> Reread:
    """Reads the same adapter as it is and with this damage."""

    def read_twice(damage: Damage) -> tuple[AdapterFile, AdapterFile]:
        folder = write(config, tensors, "two")
        damage(folder)
        return read_adapter(write(config, tensors, "one"), shape), read_adapter(folder, shape)

    return read_twice


@pytest.mark.parametrize(
    "damage",
    [
        change(fan_in_fan_out=True, lora_dropout=0.5, inference_mode=True, use_dora=False, modules_to_save=[]),
        change(rank_pattern=None, alpha_pattern={}, layers_to_transform=[], exclude_modules=None, bias=None),
        change(target_modules=["q_proj", "down_proj", "fc1"], base_model_name_or_path="else/where"),
        change(rank_pattern={"_proj": 9}, alpha_pattern={"proj": 3}),  # PEFT matches from a border between names
        rename("lora_A.weight", "lora_A.default.weight"),
        change(rank_pattern={"q_proj": 4, "down_proj": 4}, alpha_pattern={".*": 8.0}, r=64),
    ],
)
def test_same_digest_for_the_same_mathematics(damage: Damage, reread: Reread) -> None:
    before, after = reread(damage)
    assert after.digest == before.digest
    assert {key: pair.scale for key, pair in after.weights.pairs.items()} == dict.fromkeys(before.weights.pairs, 2.0)


@pytest.mark.parametrize(
    "damage",
    [
        change(lora_alpha=9),
        change(use_rslora=True),
        change(alpha_pattern={"q_proj": 1}),
        set_value(Q_A, 0.25),
        set_value(Q_B, 0.25),
        drop("layers.1"),
        retensor(lambda tensors: tensors.update({name: value.bfloat16() for name, value in tensors.items()})),
    ],
)
def test_another_digest_for_other_mathematics(damage: Damage, reread: Reread) -> None:
    before, after = reread(damage)
    assert after.digest != before.digest


def test_weights_do_not_follow_the_file(
    write: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor], shape: LinearShape
) -> None:
    folder = write(config, tensors)
    file = read_adapter(folder, shape)
    path = folder / "adapter_model.safetensors"
    with path.open("r+b") as stream:
        stream.seek(-1024, os.SEEK_END)
        stream.write(b"\x01" * 1024)
    for (layer, target), pair in file.weights.pairs.items():
        prefix = f"base_model.model.{module_path(layer, target)}"
        assert torch.equal(pair.a, tensors[f"{prefix}.lora_A.weight"])
        assert torch.equal(pair.b, tensors[f"{prefix}.lora_B.weight"])


def test_mixed_dtypes_of_a_pair_are_promoted(
    write: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor], shape: LinearShape
) -> None:
    tensors[Q_A] = tensors[Q_A].half()
    pair = read_adapter(write(config, tensors), shape).weights.pairs[0, "q_proj"]
    assert pair.a.dtype == pair.b.dtype == torch.float32


def test_base_model_and_description(
    write: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor], shape: LinearShape
) -> None:
    folder = write(config | {"base_model_name_or_path": "org/base", "description": "from the config"}, tensors)
    file = read_adapter(folder, shape)
    assert (file.base_model, file.description) == ("org/base", "from the config")
    (folder / "README.md").write_text("---\ntags: [lora]\n---\n# Title\n\nWrites dates\nin ISO form.\n\nMore.\n")
    assert read_adapter(folder, shape).description == "Writes dates in ISO form."
