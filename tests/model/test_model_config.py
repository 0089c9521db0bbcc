"""Reading config.json: what `transformers` writes, older spellings, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.model.config import ModelConfig, ModelError, RopeConfig
from tests.model.conftest import VARIANTS, Saved

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
QWEN = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_saved_is_read_back(saved: Callable[[str], Saved], variant: str) -> None:
    model = saved(variant)
    config, theirs = ModelConfig.from_folder(model.folder), model.model.config
    assert config.family == theirs.model_type
    assert config.head_dim == model.model.model.layers[0].self_attn.head_dim
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.eos_token_ids == (2,)
    attention = model.model.model.layers[0].self_attn
    assert config.qkv_bias == (attention.q_proj.bias is not None)
    assert config.o_bias == (attention.o_proj.bias is not None)
    assert config.mlp_bias == (model.model.model.layers[0].mlp.down_proj.bias is not None)
    assert config.qk_norm == hasattr(attention, "q_norm")
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in model.model.model.layers]
    if variant.startswith("mistral"):
        windows = [theirs.sliding_window] * 3
    assert list(config.sliding_windows) == windows
    shape = config.linear_shape
    for target in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear = getattr(attention, target)
        assert (shape.inputs[target], shape.outputs[target]) == (linear.in_features, linear.out_features)


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({}, RopeConfig()),
        ({"rope_theta": 5e5}, RopeConfig(5e5)),
        ({"rope_theta": 100, "rope_scaling": None}, RopeConfig(100.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig(10000.0, "linear", 2.0)),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, RopeConfig(5e5, "llama3", 32.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, RopeConfig(7.0)),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}, RopeConfig(5e5, "llama3", 32.0)),
        (
            {"rope_theta": 9.0, "rope_parameters": {"rope_type": "linear", "factor": 8.0}},
            RopeConfig(9.0, "linear", 8.0),
        ),
    ],
)
def test_both_spellings_of_rope(fields: dict[str, Any], rope: RopeConfig) -> None:
    assert ModelConfig.from_dict({**LLAMA, **fields}).rope == rope


def test_windows_of_qwen_need_their_switch() -> None:
    window = {"sliding_window": 16, "max_window_layers": 3}
    assert ModelConfig.from_dict({**QWEN, **window}).sliding_windows == (None,) * 4
    on = {**QWEN, **window, "use_sliding_window": True}
    assert ModelConfig.from_dict(on).sliding_windows == (None, None, None, 16)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert ModelConfig.from_dict({**on, "layer_types": kinds}).sliding_windows == (16, None, 16, None)


def test_defaults_of_absent_fields() -> None:
    raw = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
    config = ModelConfig.from_dict({**raw, "head_dim": None})
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (8, 8, 1e-6)
    assert not config.tie_word_embeddings
    assert config.eos_token_ids == ()
    by_type = {key: value for key, value in LLAMA.items() if key != "architectures"}
    assert ModelConfig.from_dict(by_type).family == "llama"


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({}, "float32"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16", "torch_dtype": None}, "float16"),
    ],
)
def test_dtype_of_the_checkpoint(fields: dict[str, Any], dtype: str) -> None:
    assert ModelConfig.from_dict({**LLAMA, **fields}).dtype == dtype


def test_generation_config_decides_what_ends_an_answer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 2}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (7, 9)


def test_fingerprint_tells_architectures_apart() -> None:
    one = ModelConfig.from_dict(LLAMA)
    assert one.fingerprint() == ModelConfig.from_dict(dict(LLAMA)).fingerprint()
    assert one.fingerprint() != ModelConfig.from_dict({**LLAMA, "rope_theta": 20000.0}).fingerprint()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "'MixtralForCausalLM' is not supported; supported are LlamaFor"),
        ({"architectures": None, "model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"architectures": None, "model_type": None}, "None is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act .* 'gelu'; only 'silu'"),
        ({"hidden_size": None}, "lacks hidden_size, a positive integer"),
        ({"vocab_size": "many"}, "vocab_size .* 'many'; expected a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers .* 0; expected a positive integer"),
        ({"num_attention_heads": True}, "num_attention_heads .* True"),
        ({"num_key_value_heads": 3}, "expected a multiple of num_key_value_heads, 3"),
        ({"head_dim": 7}, "head_dim .* 7; .* even"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"attention_bias": "yes"}, "attention_bias .* 'yes'; expected true or false"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' .* supported are default, linear, llama3"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({"rope_scaling": "linear"}, "rope_scaling .* expected one flat object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters .* one flat object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of config.json lacks factor"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_dict({**LLAMA, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_types": ["full_attention"]},
        {"layer_types": ["chunked"] * 4},
        {"max_window_layers": "all"},
        {"sliding_window": 0},
    ],
)
def test_wrong_windows_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(fields))):
        ModelConfig.from_dict({**QWEN, "use_sliding_window": True, **fields})


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere does not exist"):
        ModelConfig.from_folder(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"not a model folder: it has no config\.json"):
        ModelConfig.from_folder(tmp_path)
    for text in ('{"vocab_size": ', "\x00", '"text"'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"config\.json"):
            ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        ModelConfig.from_folder(tmp_path)
