"""Refusals of broken PEFT folders: the right code and one clear sentence, whatever the bytes."""

import json
import os
import struct
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from adapters_store.peft_format import read_adapter, read_summary
from adapters_store.types import AdapterError, AdapterLimits, LinearShape
from tests.adapters_store.damage import (
    LAYER0,
    Q_A,
    Q_B,
    Damage,
    change,
    drop,
    pickled,
    put,
    raw_config,
    raw_weights,
    recast,
    remove,
    rename,
    retensor,
    set_value,
    widen,
)


@dataclass(frozen=True)
class Row:
    """How an adapter is broken, the code it gets, and a word that its message must hold."""

    label: str
    damage: Damage
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
    Row("half a character", raw_config(b'{"use_\\ud800": 1}'), "adapter_bad_config", "Unicode"),
    Row("half a character in a value", raw_config(b'{"description": "\\udfff"}'), "adapter_bad_config", "Unicode"),
    Row("config huge", raw_config(b" " * (1 << 21)), "adapter_bad_config", "large"),
    Row("no peft_type", change(peft_type=None), "adapter_bad_config", "peft_type"),
    Row("other method", change(peft_type="IA3"), "adapter_unsupported", "IA3"),
    Row("no rank", change(r=None), "adapter_bad_config", "r is None"),
    Row("rank 0", change(r=0), "adapter_bad_config", "positive"),
    Row("rank beyond all", change(r=10**400), "adapter_bad_config", "positive"),
    Row("rank in a pattern beyond all", change(rank_pattern={"q_proj": 1 << 31}), "adapter_bad_config", "positive"),
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
    Row("many regexes", change(rank_pattern={f"x{i}.*": 4 for i in range(300)}), "adapter_bad_config", "at most 256"),
    Row("many names", change(alpha_pattern={f"x{i}": 4 for i in range(5000)}), "adapter_bad_config", "at most 4096"),
    Row("bias", change(bias="all"), "adapter_unsupported", "bias"),
    Row("bias on B", change(lora_bias=True), "adapter_unsupported", "lora_bias"),
    Row("modules_to_save", change(modules_to_save=["lm_head"]), "adapter_unsupported", "no support for fully trained"),
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
    read_adapter(folder, shape, AdapterLimits(max_bytes=size))
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder, shape, AdapterLimits(max_bytes=size - 1))
    assert (caught.value.code, caught.value.status) == ("adapter_too_large", 413)


def test_refuses_ranks_beyond_the_limit(
    write: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor], shape: LinearShape
) -> None:
    folder = write(config, tensors)
    read_adapter(folder, shape, AdapterLimits(max_rank=4))
    for read in (read_adapter, read_summary):
        with pytest.raises(
            AdapterError, match=r"rank 4 of model\.layers\.0\.mlp\.down_proj .*expected at most 3"
        ) as caught:
            read(folder, shape, AdapterLimits(max_rank=3))
        assert (caught.value.code, caught.value.status) == ("adapter_unsupported", 422)
    large = {name: torch.ones(*(513 if size == 4 else size for size in t.shape)) for name, t in tensors.items()}
    with pytest.raises(AdapterError, match="expected at most 512"):
        read_adapter(write(config | {"r": 513}, large, "large"), shape)


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
