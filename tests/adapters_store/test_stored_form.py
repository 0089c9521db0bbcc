"""The stored form: a function of the digest, in PEFT's format."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters_store.peft_format import CONFIG_NAME, WEIGHTS_NAME, read_adapter, read_summary
from adapters_store.stored_form import write_stored
from adapters_store.types import TARGETS, AdapterError, AdapterLimits, LinearShape
from tests.adapters_store.damage import Q_A, Q_B, change, recast, rename, set_value
from tests.adapters_store.test_peft_format import saved_by_peft
from tests.adapters_store.test_peft_write import assert_same, loaded_by_peft, tiny_llama

LIMITS = AdapterLimits()
RAGGED = {r"layers\.0\..*": 3, "model.layers.1.self_attn.q_proj": 7, "v_proj": 2}


def stored_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear", "lora_dropout": 0.3},
        {"r": 4, "target_modules": list(TARGETS), "rank_pattern": RAGGED, "alpha_pattern": RAGGED},
        {"r": 4, "target_modules": list(TARGETS), "rank_pattern": RAGGED, "use_rslora": True},
        {"r": 2, "target_modules": r".*\.1\.(mlp\.(up|gate)_proj|self_attn\.o_proj)"},
        {"r": 2, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": 1},
        {"r": 4, "target_modules": ["k_proj"], "dtype": torch.float16, "exclude_modules": ["model.layers.0.mlp"]},
    ],
)
def test_peft_loads_it_as_it_loads_the_original(tmp_path: Path, shape: LinearShape, options: dict[str, Any]) -> None:
    original, stored = tmp_path / "original", tmp_path / "stored"
    saved_by_peft(original, **options)
    summary = write_stored(original, stored, shape, LIMITS)
    assert set(stored_bytes(stored)) == {CONFIG_NAME, WEIGHTS_NAME}
    expected = loaded_by_peft(original, tiny_llama())
    assert_same(loaded_by_peft(stored, tiny_llama()), expected)
    assert read_adapter(stored, shape).digest == summary.digest == read_adapter(original, shape).digest
    assert vars(summary) == vars(read_summary(original, shape))
    again = tmp_path / "again"
    write_stored(stored, again, shape, LIMITS)
    assert stored_bytes(again) == stored_bytes(stored)


def test_equal_digests_have_equal_files(
    write: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor], shape: LinearShape, tmp_path: Path
) -> None:
    """Whatever else the files hold: what the first one sends is what the next one with these weights is served."""
    plain, heavy = write(config, tensors, "plain"), write(config, tensors, "heavy")
    rename("lora_A.weight", "lora_A.default.weight")(heavy)
    named = load_file(heavy / WEIGHTS_NAME)
    save_file(named, heavy / WEIGHTS_NAME, {str(number): "x" * 90 for number in range(20_000)})
    patterns = {f"(a|b)?.*.*x{number}": 9 for number in range(200)}
    change(
        r=64,
        lora_alpha=3,
        rank_pattern=patterns | {".*": 4},
        alpha_pattern={"q_proj": 8, "mlp.down_proj": 8},
        target_modules=".*",
        base_model_name_or_path="org/another",
        description="d" * 1000,
        lora_dropout=0.5,
    )(heavy)
    summaries = [write_stored(folder, tmp_path / f"{folder.name}-stored", shape, LIMITS) for folder in (plain, heavy)]
    assert summaries[0].digest == summaries[1].digest
    assert [summary.alpha for summary in summaries] == [8, 8]
    assert stored_bytes(tmp_path / "plain-stored") == stored_bytes(tmp_path / "heavy-stored")
    with safe_open(tmp_path / "heavy-stored" / WEIGHTS_NAME, framework="pt") as file:
        assert file.metadata() is None
    fields = json.loads((tmp_path / "heavy-stored" / CONFIG_NAME).read_text())
    assert (fields["r"], fields["lora_alpha"], fields["rank_pattern"], fields["alpha_pattern"]) == (4, 8, {}, {})
    assert fields["target_modules"] == ["down_proj", "q_proj"]
    assert (summaries[1].base_model, summaries[1].description) == ("org/another", "d" * 1000)


MODULES = [(layer, target) for layer in range(2) for target in ("q_proj", "k_proj", "down_proj")]
ALPHAS = st.sampled_from([0.0, -0.0, 8.0, -0.5, 1e300, 5e-324, 0.1]) | st.floats(-1e38, 1e38)


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.dictionaries(st.sampled_from(MODULES), st.integers(1, 5), min_size=1),
    alphas=st.lists(ALPHAS.filter(lambda alpha: abs(alpha) < 3e38), min_size=6, max_size=6),
    rslora=st.booleans(),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), min_size=12, max_size=12),
)
def test_ranks_alphas_and_dtypes_stay(
    tmp_path_factory: pytest.TempPathFactory,
    ranks: dict[tuple[int, str], int],
    alphas: list[float],
    rslora: bool,
    dtypes: list[torch.dtype],
) -> None:
    inputs, outputs = {"q_proj": 6, "k_proj": 6, "down_proj": 5}, {"q_proj": 6, "k_proj": 3, "down_proj": 6}
    shape, folder, kinds = LinearShape(2, inputs, outputs), tmp_path_factory.mktemp("original"), iter(dtypes)
    paths = {
        module: f"model.layers.{module[0]}.{'mlp' if 'down' in module[1] else 'self_attn'}.{module[1]}"
        for module in ranks
    }
    tensors = {}
    for (layer, target), rank in ranks.items():
        prefix = f"base_model.model.{paths[layer, target]}.lora_"
        tensors[f"{prefix}A.weight"] = torch.randn(rank, inputs[target]).to(next(kinds))
        tensors[f"{prefix}B.weight"] = torch.randn(outputs[target], rank).to(next(kinds))
    save_file(tensors, folder / WEIGHTS_NAME)
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "use_rslora": rslora,
        "target_modules": list(paths.values()),
        "rank_pattern": {paths[module]: rank for module, rank in ranks.items()},
        "alpha_pattern": {paths[module]: alpha for module, alpha in zip(ranks, alphas, strict=False)},
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    summary = write_stored(folder, folder / "stored", shape, LIMITS)
    before, after = read_adapter(folder, shape), read_adapter(folder / "stored", shape)
    assert after.digest == before.digest == summary.digest
    assert vars(summary) == vars(read_summary(folder / "stored", shape)) | {"base_model": None, "description": ""}
    for module, pair in before.weights.pairs.items():
        assert torch.equal(pair.a, after.weights.pairs[module].a)
        assert torch.equal(pair.b, after.weights.pairs[module].b)
        assert pair.scale == after.weights.pairs[module].scale
    kept = load_file(folder / "stored" / WEIGHTS_NAME)
    assert {name: tensor.dtype for name, tensor in kept.items()} == {name: t.dtype for name, t in tensors.items()}


def test_what_is_refused(
    write: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor], shape: LinearShape, tmp_path: Path
) -> None:
    folder = write(config, tensors)
    set_value(Q_B, float("nan"))(folder)
    with pytest.raises(AdapterError) as caught:
        write_stored(folder, tmp_path / "into", shape, LIMITS)
    assert caught.value.code == "adapter_not_finite"
    with pytest.raises(AdapterError, match="at most 3"):
        write_stored(folder, tmp_path / "into", shape, AdapterLimits(max_rank=3))


def test_tensors_lie_in_the_librarys_order(
    write: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor], shape: LinearShape, tmp_path: Path
) -> None:
    folder = write(config, tensors)
    recast(torch.bfloat16)(folder)
    write_stored(folder, tmp_path / "into", shape, LIMITS)
    header = (tmp_path / "into" / WEIGHTS_NAME).read_bytes()
    length = struct.unpack("<Q", header[:8])[0]
    assert list(json.loads(header[8 : 8 + length])) == [*sorted(set(tensors) - {Q_A}), Q_A]
