"""Reading PEFT folders: what PEFT itself writes, and what must be refused."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adapters_store.peft_format import module_path, read_adapter
from adapters_store.types import TARGETS, AdapterError, LinearShape

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT's use of transformers

LAYER0 = "base_model.model.model.layers.0"
Q_A = f"{LAYER0}.self_attn.q_proj.lora_A.weight"
Q_B = f"{LAYER0}.self_attn.q_proj.lora_B.weight"


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
    assert file.alpha == options.get("lora_alpha", 8)
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


def change(**fields: Any) -> Callable[[Path], None]:
    """Overwrite fields of the config."""

    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return apply


def retensor(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Edit the tensors in place."""

    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return apply


def rename(old: str, new: str) -> Callable[[Path], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return retensor(edit)


def raw_config(text: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "adapter_config.json").write_bytes(text)

    return apply


def raw_weights(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(edit(path.read_bytes()))

    return apply


def remove(*names: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def set_value(name: str, value: float) -> Callable[[Path], None]:
    return retensor(lambda tensors: tensors[name].view(-1).__setitem__(3, value))


def recast(dtype: torch.dtype) -> Callable[[Path], None]:
    return retensor(lambda tensors: tensors.update({Q_A: tensors[Q_A].to(dtype)}))


def put(name: str, *size: int) -> Callable[[Path], None]:
    return retensor(lambda tensors: tensors.update({name: torch.ones(*size)}))


def drop(part: str) -> Callable[[Path], None]:
    return retensor(lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name])


def widen(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = torch.ones(4, 32) if "lora_A" in name else torch.ones(tensor.shape[0] + 16, 4)


@dataclass(frozen=True)
class Row:
    """How an adapter is broken, the code it gets, and a word that its message must hold."""

    label: str
    damage: Callable[[Path], None]
    code: str
    word: str
    status: int = 422


BROKEN = [
    Row("no config", remove("adapter_config.json"), "adapter_incomplete", "adapter_config.json"),
    Row("no weights", remove("adapter_model.safetensors"), "adapter_incomplete", "adapter_model.safetensors"),
    Row("pickle", pickled, "not_safetensors", "adapter_model.bin", 415),
    Row("config not json", raw_config(b"{"), "adapter_bad_config", "JSON"),
    Row("config not text", raw_config(b"\xff\xfe\x00\x80"), "adapter_bad_config", "JSON"),
    Row("config nested", raw_config(b"[" * 100_000), "adapter_bad_config", "JSON"),
    Row("config a list", raw_config(b"[1]"), "adapter_bad_config", "object"),
    Row("config huge", raw_config(b" " * (1 << 21)), "adapter_bad_config", "large"),
    Row("no peft_type", change(peft_type=None), "adapter_bad_config", "peft_type"),
    Row("other method", change(peft_type="IA3"), "adapter_unsupported", "IA3"),
    Row("no rank", change(r=None), "adapter_bad_config", "r is None"),
    Row("rank 0", change(r=0), "adapter_bad_config", "positive"),
    Row("rank a flag", change(r=True), "adapter_bad_config", "positive"),
    Row("rank of text", change(r="4"), "adapter_bad_config", "positive"),
    Row("alpha nan", change(lora_alpha=float("nan")), "adapter_bad_config", "lora_alpha"),
    Row("alpha beyond float32", change(lora_alpha=10**400), "adapter_bad_config", "lora_alpha"),
    Row("no alpha", change(lora_alpha=None), "adapter_bad_config", "lora_alpha"),
    Row("rslora of text", change(use_rslora="yes"), "adapter_bad_config", "use_rslora"),
    Row("rank_pattern a list", change(rank_pattern=["q_proj"]), "adapter_bad_config", "rank_pattern"),
    Row("rank_pattern value", change(rank_pattern={"q_proj": -1}), "adapter_bad_config", "q_proj"),
    Row("rank_pattern regex", change(rank_pattern={"(": 4}), "adapter_bad_config", "rank_pattern"),
    Row("alpha_pattern value", change(alpha_pattern={"q_proj": "8"}), "adapter_bad_config", "q_proj"),
    Row("no targets", change(target_modules=None), "adapter_bad_config", "target_modules"),
    Row("targets of numbers", change(target_modules=[1]), "adapter_bad_config", "target_modules"),
    Row("target regex", change(target_modules="*"), "adapter_bad_config", "target_modules"),
    Row("slow regex", change(target_modules=r"(?:.|..|...)+(?<=#)"), "adapter_bad_config", "target_modules"),
    Row("layers of text", change(layers_to_transform="0"), "adapter_bad_config", "layers_to_transform"),
    Row("dora", change(use_dora=True), "adapter_unsupported", "DoRA"),
    Row("bias", change(bias="all"), "adapter_unsupported", "bias"),
    Row("bias on B", change(lora_bias=True), "adapter_unsupported", "lora_bias"),
    Row("modules_to_save", change(modules_to_save=["lm_head"]), "adapter_unsupported", "modules_to_save"),
    Row("layer replication", change(layer_replication=[[0, 1]]), "adapter_unsupported", "layer_replication"),
    Row("activated", change(alora_invocation_tokens=[1]), "adapter_unsupported", "alora_invocation_tokens"),
    Row("a later variant", change(use_something=True), "adapter_unsupported", "use_something"),
    Row("pissa", change(init_lora_weights="pissa_niter_4"), "adapter_unsupported", "pissa_niter_4"),
    Row("head targeted", change(target_modules=["q_proj", "lm_head"]), "adapter_unsupported", "lm_head"),
    Row("head tensor", put("base_model.model.lm_head.lora_A.weight", 4, 16), "adapter_unsupported", "lm_head"),
    Row(
        "embedding tensor",
        put("base_model.model.model.embed_tokens.lora_embedding_A", 4, 32),
        "adapter_unsupported",
        "embed_tokens",
    ),
    Row(
        "magnitude tensor",
        put(f"{LAYER0}.self_attn.q_proj.lora_magnitude_vector", 16),
        "adapter_unsupported",
        "lora_magnitude_vector",
    ),
    Row("truncated", raw_weights(lambda data: data[:-8]), "adapter_corrupt", "safetensors"),
    Row("empty", raw_weights(lambda _: b""), "adapter_corrupt", "safetensors"),
    Row(
        "header too long",
        raw_weights(lambda data: struct.pack("<Q", 1 << 62) + data[8:]),
        "adapter_corrupt",
        "complete",
    ),
    Row("header not json", raw_weights(lambda data: data[:8] + b"x" + data[9:]), "adapter_corrupt", "safetensors"),
    Row("trailing bytes", raw_weights(lambda data: data + b"1234"), "adapter_corrupt", "safetensors"),
    Row("no tensor", raw_weights(lambda _: save({})), "adapter_touches_no_module", "no tensor"),
    Row("other architecture", rename("model.layers", "transformer.h"), "adapter_touches_no_module", "transformer.h"),
    Row("one stranger", put(f"{LAYER0}.mlp.fc1.lora_A.weight", 4, 16), "adapter_unknown_tensor", "fc1"),
    Row("wrong block", rename("self_attn.q_proj", "mlp.q_proj"), "adapter_unknown_tensor", "mlp.q_proj"),
    Row("layer beyond", rename("layers.1.", "layers.7."), "adapter_unknown_tensor", "layers.7"),
    Row("other adapter name", rename("lora_A", "lora_A.second"), "adapter_unknown_tensor", "second"),
    Row("same twice", put(Q_A.replace("lora_A", "lora_A.default"), 4, 16), "adapter_unknown_tensor", "twice"),
    Row("outside of targets", change(target_modules=["q_proj"]), "adapter_bad_config", "down_proj"),
    Row("outside of layers", change(layers_to_transform=[0]), "adapter_bad_config", "layers.1"),
    Row("excluded", change(exclude_modules=["q_proj"]), "adapter_bad_config", "q_proj"),
    Row("A without B", retensor(lambda tensors: tensors.pop(Q_B)), "adapter_incomplete", "lora_B"),
    Row("B without A", retensor(lambda tensors: tensors.pop(Q_A)), "adapter_incomplete", "lora_A"),
    Row("no B at all", drop("lora_B"), "adapter_incomplete", "lora_B"),
    Row("rank differs", change(r=8), "adapter_shape_mismatch", "[8, 24]"),
    Row("pattern differs", change(rank_pattern={"q_proj": 2}), "adapter_shape_mismatch", "[2, 16]"),
    Row("one shape", put(Q_A, 4, 32), "adapter_shape_mismatch", "[4, 16]"),
    Row("one vector", put(Q_B, 16), "adapter_shape_mismatch", "[16, 4]"),
    Row("every shape", retensor(widen), "adapter_wrong_base", "expected"),
    Row("nan", set_value(Q_A, float("nan")), "adapter_not_finite", Q_A),
    Row("infinity", set_value(Q_B, float("-inf")), "adapter_not_finite", Q_B),
    Row("float64", recast(torch.float64), "adapter_unsupported", "F64"),
    Row("integers", recast(torch.int32), "adapter_unsupported", "I32"),
    Row("float8", recast(torch.float8_e4m3fn), "adapter_unsupported", "F8"),
]


@pytest.mark.parametrize("row", BROKEN, ids=lambda row: row.label)
def test_refuses_with_one_sentence(
    row: Row, write: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor], shape: LinearShape
) -> None:
    folder = write(config, tensors)
    row.damage(folder)
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder, shape)
    error = caught.value
    assert (error.code, error.status) == (row.code, row.status)
    assert row.word in error.message
    assert "expected" in error.message
    assert "\n" not in error.message
    assert str(folder) not in error.message
    assert len(error.message) < 400


def test_refuses_too_large(
    write: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor], shape: LinearShape
) -> None:
    folder = write(config, tensors)
    size = os.path.getsize(folder / "adapter_model.safetensors")
    read_adapter(folder, shape, max_bytes=size)
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder, shape, max_bytes=size - 1)
    assert (caught.value.code, caught.value.status) == ("adapter_too_large", 413)


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
def test_same_digest_for_the_same_mathematics(
    damage: Callable[[Path], None],
    write: Any,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    shape: LinearShape,
) -> None:
    before = read_adapter(write(config, tensors, "one"), shape)
    folder = write(config, tensors, "two")
    damage(folder)
    after = read_adapter(folder, shape)
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
def test_another_digest_for_other_mathematics(
    damage: Callable[[Path], None],
    write: Any,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    shape: LinearShape,
) -> None:
    before = read_adapter(write(config, tensors, "one"), shape)
    folder = write(config, tensors, "two")
    damage(folder)
    assert read_adapter(folder, shape).digest != before.digest


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


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    shape = LinearShape(1, {"q_proj": 4}, {"q_proj": 4})
    weights = bytearray(save({Q_A: torch.ones(2, 4), Q_B: torch.ones(4, 2)}))
    config = bytearray(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}).encode()
    )
    for content in (weights, config):
        for _ in range(data.draw(st.integers(0, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        del content[data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content)))) :]
    folder = tmp_path_factory.mktemp("damaged", numbered=True)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_bytes(config)
    try:
        file = read_adapter(folder, shape)
    except AdapterError as error:
        assert "expected" in error.message  # noqa: PT017 - either outcome is right
    else:
        assert all(
            torch.isfinite(pair.a).all() and torch.isfinite(pair.b).all() for pair in file.weights.pairs.values()
        )
