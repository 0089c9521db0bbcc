"""Loading weights: shards, conversions, and tensors or files that are wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.model.config import ModelConfig, ModelError
from server.model.decoder import Decoder
from server.model.weights import ModelWeights, load_weights
from tests.model.conftest import CPU, Driver, Saved

Change = Callable[[dict[str, Tensor]], None]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> ModelWeights:
    return load_weights(folder, ModelConfig.from_folder(folder), CPU, dtype)


@pytest.fixture
def changed(saved: Callable[[str], Saved], tmp_path: Path) -> Callable[..., Path]:
    """`changed(variant, change)`: a copy of the model's folder whose tensors went through `change`."""

    def make(variant: str, change: Change = list) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(saved(variant).folder, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def test_groups_are_merged_in_order(saved: Callable[[str], Saved]) -> None:
    model = saved("qwen2")
    weights = load(model.folder)
    attention, mlp = model.model.model.layers[1].self_attn, model.model.model.layers[1].mlp
    layer = weights.layers[1]
    assert torch.equal(layer.qkv, torch.cat([getattr(attention, f"{part}_proj").weight for part in "qkv"]))
    assert layer.qkv_bias is not None
    assert torch.equal(layer.qkv_bias, torch.cat([getattr(attention, f"{part}_proj").bias for part in "qkv"]))
    assert torch.equal(layer.gate_up, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
    assert torch.equal(layer.down, mlp.down_proj.weight)
    assert (layer.o_bias, layer.gate_up_bias, layer.q_norm) == (None, None, None)


def test_a_tied_head_is_the_embedding_and_may_be_in_the_file(changed: Callable[..., Path]) -> None:
    folder = changed("llama-tied", lambda tensors: tensors.update({"lm_head.weight": torch.ones(96, 48)}))
    weights = load(folder)
    assert weights.lm_head is weights.embedding
    assert not torch.equal(weights.lm_head, torch.ones(96, 48))


def test_shards_give_the_same_logits(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    model = saved("qwen3")
    model.model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    driver = Driver(Decoder.from_folder(tmp_path, CPU, torch.float32))
    [logits] = driver.step([(driver.add(), [5, 6, 7])])
    torch.testing.assert_close(logits, model.logits([5, 6, 7]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_any_float_type_are_converted(changed: Callable[..., Path], dtype: torch.dtype) -> None:
    def convert(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    weights = load(changed("llama", convert))
    assert weights.embedding.dtype == weights.layers[0].qkv.dtype == torch.float32


def test_rotary_buffers_of_old_files_are_ignored(changed: Callable[..., Path]) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert load(changed("llama", lambda tensors: tensors.update({name: torch.ones(4)}))).norm.shape == (48,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"lack model\.layers\.1\.mlp\.up_proj\.weight\."),
        (lambda t: t.pop("lm_head.weight"), r"lack lm_head\.weight"),
        (lambda t: [t.pop(name) for name in list(t) if ".2." in name], "and 5 more"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}),
            r"a llama model does not have: model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
        (
            lambda t: t.update({"model.layers.3.input_layernorm.weight": torch.ones(48)}),
            r"does not have: model\.layers\.3",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(48, 16)}),
            r"k_proj\.weight has shape \[48, 16\]; config\.json implies \[16, 48\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}),
            r"model\.norm\.weight has dtype I8",
        ),
    ],
    ids=["missing", "missing-head", "missing-many", "unknown-bias", "unknown-layer", "shape", "dtype"],
)
def test_wrong_tensors_are_named(changed: Callable[..., Path], change: Change, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(changed("llama", change))


def test_a_truncated_file(changed: Callable[..., Path]) -> None:
    file = changed("llama") / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 5, 300, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"model\.safetensors cannot be read as safetensors"):
            load(file.parent)


def test_folders_without_weights(changed: Callable[..., Path]) -> None:
    folder = changed("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights; expected model\.safetensors"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin, and pickled weights are not loaded"):
        load(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "cannot be read; expected a JSON object with a weight_map"),
        ("[]", "cannot be read"),
        ('{"weight_map": {"a": 7}}', "7"),
        (
            '{"weight_map": {"model.norm.weight": "model-00002.safetensors"}}',
            r"lists 'model-00002\.safetensors', which is not",
        ),
        ('{"weight_map": {"model.norm.weight": "../model.safetensors"}}', r"lists '\.\./model\.safetensors'"),
    ],
    ids=["json", "list", "number", "missing-shard", "outside"],
)
def test_a_wrong_index(changed: Callable[..., Path], index: str, message: str) -> None:
    folder = changed("llama")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_an_index_that_promises_too_much(changed: Callable[..., Path]) -> None:
    folder = changed("llama", lambda tensors: [tensors.pop(name) for name in list(tensors) if "norm" in name])
    index = json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"lack model\..*norm\.weight"):
        load(folder)
