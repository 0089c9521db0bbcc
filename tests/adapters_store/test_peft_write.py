"""Folders written for PEFT: our reader and PEFT itself load what was written."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

from adapters_store.linear_names import module_path
from adapters_store.merging import MergeMethod, MergeRecipe, merge
from adapters_store.peft_format import read_adapter
from adapters_store.peft_write import write_peft
from adapters_store.types import TARGETS, AdapterError, AdapterWeights, LinearShape, LoraPair

Module = tuple[int, str]
CONFIG, WEIGHTS, RECIPE = "adapter_config.json", "adapter_model.safetensors", "loramux.json"


def tiny_llama(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def random_weights(
    shape: LinearShape,
    ranks: dict[Module, int],
    scales: dict[Module, float] | float = 2.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for module, rank in ranks.items():
        a = torch.randn(rank, shape.inputs[module[1]], generator=generator).to(dtype)
        b = torch.randn(shape.outputs[module[1]], rank, generator=generator).to(dtype)
        pairs[module] = LoraPair(a, b, scales[module] if isinstance(scales, dict) else scales)
    return AdapterWeights(f"adapter {seed}", pairs)


def loaded_by_peft(folder: Path, model: LlamaForCausalLM) -> dict[Module, LoraPair]:
    loaded = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    pairs = {}
    for path, layer in loaded.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            _, _, number, _, target = path.split(".")
            a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
            pairs[int(number), target] = LoraPair(a, b, layer.scaling["default"])
    return pairs


def assert_same(actual: dict[Module, LoraPair], expected: dict[Module, LoraPair]) -> None:
    assert set(actual) == set(expected)
    for module, pair in actual.items():
        other = expected[module]
        assert abs(pair.scale - other.scale) <= math.ulp(other.scale)
        assert (pair.a.dtype, pair.b.dtype) == (other.a.dtype, other.b.dtype)
        assert torch.equal(pair.a, other.a)
        assert torch.equal(pair.b, other.b)


def config_of(folder: Path) -> dict[str, object]:
    fields = json.loads((folder / CONFIG).read_text())
    assert isinstance(fields, dict)
    return fields


MODULES = [(layer, target) for layer in range(2) for target in TARGETS]


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.dictionaries(st.sampled_from(MODULES), st.integers(1, 9), min_size=1),
    scales=st.lists(
        st.sampled_from([0.0, 1.0, 2.0, -0.5]) | st.floats(-64, 64, allow_subnormal=False), min_size=14, max_size=14
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_reads_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, ranks: dict[Module, int], scales: list[float], dtype: torch.dtype
) -> None:
    inputs = dict.fromkeys(TARGETS, 16) | {"down_proj": 24}
    outputs = dict.fromkeys(TARGETS, 16) | {"k_proj": 8, "v_proj": 8, "gate_proj": 24, "up_proj": 24}
    shape = LinearShape(2, inputs, outputs)
    weights = random_weights(shape, ranks, dict(zip(MODULES, scales, strict=True)), dtype)
    folder = tmp_path_factory.mktemp("written")
    write_peft(folder, weights)
    assert_same(dict(read_adapter(folder, shape).weights.pairs), dict(weights.pairs))


@pytest.mark.parametrize("case", ["even", "by target", "one path", "ragged", "alone"])
def test_peft_loads_the_same(tmp_path: Path, shape: LinearShape, case: str) -> None:
    """Twelve layers: paths of layers 1, 10 and 11 must not be taken for each other."""
    shape = replace(shape, num_layers=12)
    every = {(layer, target): 4 for layer in range(12) for target in TARGETS}
    ranks, scales = {
        "even": (every, dict.fromkeys(every, 2.0)),
        "by target": (
            {key: 3 if key[1] == "v_proj" else 4 for key in every},
            {key: 0.3 if key[1] == "o_proj" else 0.7 for key in every},
        ),
        "one path": (every | {(1, "q_proj"): 7}, dict.fromkeys(every, 0.1) | {(11, "q_proj"): 5.0}),
        "ragged": (
            {key: 1 + (7 * key[0] + len(key[1])) % 5 for key in every if (key[0] + len(key[1])) % 3},
            {key: 1 / (1 + key[0]) for key in every},
        ),
        "alone": ({(1, "down_proj"): 2}, dict.fromkeys(every, 1.0)),
    }[case]
    weights = random_weights(shape, ranks, scales)
    write_peft(tmp_path, weights, "org/base")
    assert_same(loaded_by_peft(tmp_path, tiny_llama(12)), dict(weights.pairs))
    file = read_adapter(tmp_path, shape)
    assert_same(dict(file.weights.pairs), dict(weights.pairs))
    assert file.base_model == "org/base"


def test_config_says_no_more_than_needed(tmp_path: Path, shape: LinearShape) -> None:
    every = {(layer, target): 4 for layer in range(2) for target in ("v_proj", "q_proj")}
    write_peft(tmp_path, random_weights(shape, every))
    fields = config_of(tmp_path)
    assert (fields["r"], fields["lora_alpha"], fields["use_rslora"]) == (4, 8, False)
    assert (fields["target_modules"], fields["layers_to_transform"]) == (["q_proj", "v_proj"], [0, 1])
    assert fields["rank_pattern"] == fields["alpha_pattern"] == {}
    write_peft(tmp_path, random_weights(shape, every | {(0, "v_proj"): 2, (1, "v_proj"): 2, (0, "k_proj"): 4}))
    fields = config_of(tmp_path)
    assert fields["rank_pattern"] == {"v_proj": 2}
    assert fields["alpha_pattern"] == {"v_proj": 4}
    assert fields["target_modules"] == [
        module_path(*module) for module in [(0, "k_proj"), (0, "q_proj"), (0, "v_proj"), (1, "q_proj"), (1, "v_proj")]
    ]
    write_peft(tmp_path, random_weights(shape, every | {(0, "v_proj"): 2}))
    assert config_of(tmp_path)["rank_pattern"] == {"model.layers.0.self_attn.v_proj": 2}


@pytest.mark.parametrize("method", MergeMethod)
def test_merges_serve_through_peft(tmp_path: Path, shape: LinearShape, method: MergeMethod) -> None:
    """The logits with the folder loaded by PEFT are those of a model whose weights hold the merge."""
    first = random_weights(shape, {(0, "q_proj"): 3, (1, "q_proj"): 3, (1, "up_proj"): 2}, 0.3, seed=1)
    second = random_weights(shape, {(0, "q_proj"): 3, (1, "down_proj"): 5}, 0.7, seed=2)
    density = 0.6 if method.prunes else None
    merged = merge([(first, 0.5), (second, -1.5)], method, density=density)
    recipe = MergeRecipe.of([(first.digest, 0.5), (second.digest, -1.5)], method, density=density)
    write_peft(tmp_path, merged, recipe=recipe.as_json())
    assert json.loads((tmp_path / RECIPE).read_text()) == recipe.as_json()
    assert_same(dict(read_adapter(tmp_path, shape).weights.pairs), dict(merged.pairs))
    model = tiny_llama()
    for module, pair in merged.pairs.items():
        model.get_submodule(module_path(*module)).weight.data += pair.scale * pair.b @ pair.a
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        base = tiny_llama()
        plain = base(tokens).logits
        actual = PeftModel.from_pretrained(base, tmp_path)(tokens).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-2


def test_same_weights_same_bytes_whatever_the_order_and_memory(tmp_path: Path, shape: LinearShape) -> None:
    weights = random_weights(shape, dict(zip(MODULES, range(1, 15), strict=True)))
    shared = LoraPair(weights.pairs[0, "q_proj"].a.T.contiguous().T, weights.pairs[0, "q_proj"].b, 2.0)
    shuffled = {module: weights.pairs[module] for module in reversed(MODULES)} | {(0, "q_proj"): shared}
    write_peft(tmp_path / "one", weights)
    write_peft(tmp_path / "sub" / "two", AdapterWeights("other", shuffled))
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "sub" / "two" / name).read_bytes()
    assert not (tmp_path / "one" / RECIPE).exists()
    twins = {(layer, "q_proj"): shared for layer in range(2)}
    write_peft(tmp_path / "twins", AdapterWeights("twins", twins))
    assert_same(dict(read_adapter(tmp_path / "twins", shape).weights.pairs), twins)


def test_refuses_nothing_to_write_and_passes_on_the_disks_errors(tmp_path: Path, shape: LinearShape) -> None:
    with pytest.raises(AdapterError, match="no LoRA pair") as caught:
        write_peft(tmp_path / "empty", AdapterWeights("empty", {}))
    assert caught.value.code == "adapter_touches_no_module"
    assert not (tmp_path / "empty").exists()
    (tmp_path / "taken" / WEIGHTS).mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        write_peft(tmp_path / "taken", random_weights(shape, {(0, "q_proj"): 2}))
