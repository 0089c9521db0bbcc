"""A quantised GGUF file of a Llama-shaped model becomes a Hugging Face folder in fp32."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
CONTROL_TOKEN = 3  # gguf's TokenType.CONTROL
TOKENIZER_FIELDS = (
    "tokens",
    "merges",
    "token_type",
    "bos_token_id",
    "eos_token_id",
    "unknown_token_id",
    "padding_token_id",
    "chat_template",
)


class ConversionError(Exception):
    """The file cannot be converted, or not into the recorded weights."""


def convert_gguf(gguf: Path, folder: Path, weights_sha256: str | None = None, context_length: int = 8192) -> str:
    """Writes the GGUF file as an fp32 folder with tokenizer and chat template; returns the sha256 of its weights.

    `transformers` reads and dequantises the file; the quantisation config is dropped. The weights are written with
    `safetensors` alone (a tied head left out), so that their digest depends on the tensors and on nothing else.

    Raises:
        ConversionError: the digest is not `weights_sha256` (unless that is None), or the tokenizer is not one of
            byte-level BPE with single digits.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    metadata = _tokenizer_metadata(gguf)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    tensors = {key: tensor.detach().contiguous() for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    digest = sha256_of(folder / WEIGHTS)
    if weights_sha256 is not None and digest != weights_sha256:
        raise ConversionError(
            f"the weights converted from {gguf.name} have sha256 {digest}, expected {weights_sha256}: "
            f"transformers {importlib.metadata.version('transformers')} with gguf "
            f"{importlib.metadata.version('gguf')} dequantises differently; install the locked versions"
        )
    special = {"bos_token_id": metadata["bos_token_id"], "eos_token_id": metadata["eos_token_id"]}
    special["pad_token_id"] = metadata["padding_token_id"]
    config = plain_config(model.config.to_diff_dict()) | special
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"_from_model_config": True, **special})
    _write_tokenizer(metadata, folder, context_length)
    return digest


def plain_config(fields: dict[str, Any]) -> dict[str, Any]:
    """A Llama config without traces of the GGUF file, its rope base in the older and the newer spelling."""
    dropped = ("quantization_config", "_model_name_or_path", "_name_or_path", "unk_token_id", "transformers_version")
    config = {key: value for key, value in fields.items() if key not in dropped}
    # The file stores fp32: 9.999999747378752e-06 is the fp32 nearest to 1e-05, so the norm computes the same.
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["architectures"] = ["LlamaForCausalLM"]
    config["dtype"] = "float32"
    return config


def sha256_of(path: Path) -> str:
    """The hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Writes `fields` as sorted, indented JSON."""
    path.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(metadata: Mapping[str, Any], folder: Path, context_length: int) -> None:
    """Builds the byte-level BPE tokenizer from the file's own tables.

    `transformers` can read it too, but its releases disagree on the special tokens and the decoder, and none knows the
    file's "smollm" pre-tokeniser: without the split into single digits, white space before a number merges
    differently from the original ("\\n\\n5", "  12").
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = metadata["tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, metadata["token_type"], strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
    fields: dict[str, Any] = {f"{short}_token": tokens[metadata[key]] for short, key in names.items()}
    fields |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", fields)
    (folder / "chat_template.jinja").write_text(metadata["chat_template"], encoding="utf-8")


def _tokenizer_metadata(gguf: Path) -> dict[str, Any]:
    """The `tokenizer.*` fields of the file, without their prefixes; only byte-level BPE with `smollm` splits.

    Raises:
        ConversionError: the file's tokenizer is of another kind, or incomplete.
    """
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    metadata = {key.split(".")[-1]: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}
    if (metadata.get("model"), metadata.get("pre")) != ("gpt2", "smollm"):
        found = f"{metadata.get('model')}/{metadata.get('pre')}"
        raise ConversionError(f"{gguf.name}: tokenizer {found}: expected gpt2/smollm")
    missing = [key for key in TOKENIZER_FIELDS if key not in metadata]
    if missing:
        raise ConversionError(f"{gguf.name}: expected the tokenizer fields {', '.join(missing)}")
    return metadata
