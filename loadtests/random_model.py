"""A model made up for a measurement: `python -m loadtests.random_model --shape 8b --tokenizer FOLDER --out DIR`.

A folder as Hugging Face has them, which any server loads: Llama's architecture, random weights in bf16, and the
tokenizer of another model, whose vocabulary may be smaller. The 8B shape is 16 GB.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loadtests.random_adapter import BLOCK, LinearSizes

Json = dict[str, Any]

LLAMA: Json = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SHAPES: dict[str, Json] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50304,
        "rope_theta": 10000.0,
    },
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
DEVIATION = 0.02


def main(arguments: Sequence[str] | None = None) -> Path:
    """Write what the command line asks for, and print where it is."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.random_model", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER", help="a model folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    try:
        folder = write_model(asked.out, SHAPES[asked.shape], asked.tokenizer, asked.seed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(folder)
    return folder


def write_model(folder: Path, shape: Json, tokenizer: Path, seed: int = 0) -> Path:
    """One file of weights for each layer, and one for what is outside of them.

    Raises ValueError if the tokenizer has more tokens than the shape, OSError if its folder cannot be read.
    """
    special = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
    if special["vocab_size"] > shape["vocab_size"]:
        raise ValueError(f"{tokenizer} has {special['vocab_size']} tokens, the shape has {shape['vocab_size']}")
    ids = {name: special[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in special}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | shape | ids, indent=1), encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder / name)
    weight_map: dict[str, str] = {}
    for number, sizes in enumerate(_parts(shape, LinearSizes.of(folder))):
        file = f"model-{number:05}.safetensors"
        save_file(_random(sizes, seed + number), folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(sizes, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _parts(shape: Json, linears: LinearSizes) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and sizes of the tensors, by file."""
    hidden, vocabulary = shape["hidden_size"], shape["vocab_size"]
    yield {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(linears.layers):
        at = f"model.layers.{layer}"
        yield {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            **{f"{at}.{BLOCK[name]}.{name}.weight": (out, width) for name, (width, out) in linears.features.items()},
        }


def _random(sizes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Norms are 1. Drawn on a GPU where there is one: 16 GB take seconds there, and minutes on a CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, size in sizes.items():
        tensor = torch.ones(size, dtype=torch.bfloat16, device=device)
        tensors[name] = tensor if len(size) == 1 else tensor.normal_(0.0, DEVIATION, generator=generator)
    return {name: tensor.cpu() for name, tensor in tensors.items()}


if __name__ == "__main__":
    main()
