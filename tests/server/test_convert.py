import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_gguf import TEMPLATE, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from server.convert import ConversionError, convert_gguf, sha256_of


def test_weights_are_the_dequantised_ones_and_the_head_stays_tied(tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf")
    digest = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model", context_length=128)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert set(stored) == set(expected)
    for name, values in expected.items():
        assert stored[name].dtype == torch.float32
        assert torch.equal(stored[name], torch.from_numpy(values)), name
    assert digest == sha256_of(tmp_path / "model" / "model.safetensors")
    assert convert_gguf(tmp_path / "tiny.gguf", tmp_path / "again", digest, context_length=128) == digest


def test_folder_loads_like_any_other(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model", context_length=128)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["rope_theta"] == 100000.0
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.dtype) == (1e-5, True, torch.float32)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert not hasattr(config, "quantization_config")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.generation_config.eos_token_id == 2
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.isfinite(model(torch.tensor([[1, 20, 30]])).logits).all()


def test_tokenizer_splits_digits_and_keeps_special_tokens(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model", context_length=128)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.tokenize("\n\n5  12") == ["ĊĊ", "5", "ĠĠ", "1", "2"]
    assert tokenizer.tokenize("<|im_end|>ab") == ["<|im_end|>", "ab"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 128
    text = "abc  é 日本 🙂\n\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.chat_template == TEMPLATE
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<|im_start|>user\nab<|im_end|>\n"


def test_unexpected_digest_is_an_error_that_names_both(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(ConversionError, match=f"have sha256 [0-9a-f]{{64}}, expected {'0' * 64}"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model", "0" * 64)


def test_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", pre_tokenizer="llama-bpe")
    with pytest.raises(ConversionError, match="gpt2/llama-bpe: expected gpt2/smollm"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
