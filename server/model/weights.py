"""Weights of the decoder, read from safetensors files into merged tensors."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters_store.types import DOWN, GATE_UP, GROUPS, QKV, O, TargetGroup
from server.model.config import ModelConfig, ModelError

FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Linears are [out, in], those of a target group merged along `out`; None: no bias or norm."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    post_attention_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True)
class ModelWeights:
    """All weights in one dtype on one device. `lm_head` [vocab, hidden] is `embedding` itself when the two are tied."""

    embedding: Tensor
    layers: list[LayerWeights]
    norm: Tensor
    lm_head: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, a tied head counted once."""
        own = [self.embedding, self.norm, *([] if self.lm_head is self.embedding else [self.lm_head])]
        own += [tensor for layer in self.layers for tensor in vars(layer).values() if tensor is not None]
        return sum(tensor.nbytes for tensor in own)


def load_weights(folder: str | Path, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> ModelWeights:
    """Read every tensor of a Hugging Face folder (one file, or shards with an index) and convert it to `dtype`.

    Raises ModelError for unreadable files and for tensors that are missing, unknown, misshapen or not floating point.
    """
    weights, missing = _allocate(config, device, dtype)
    unknown: list[str] = []
    for file in _files(Path(folder)):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    target = missing.pop(name, None)
                    if target is not None:
                        _check(name, target, tensors.get_slice(name).get_shape(), tensors.get_slice(name).get_dtype())
                        target.copy_(tensors.get_tensor(name))
                    elif not _ignored(name, config):
                        unknown.append(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} cannot be read as safetensors: {error}.") from None
    if missing:
        raise ModelError(f"The weights in {folder} lack {_some(missing)}.")
    if unknown:
        raise ModelError(
            f"The weights in {folder} hold tensors that a {config.family} model does not have: {_some(unknown)}."
        )
    return weights


def random_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int) -> ModelWeights:
    """Weights of the right shapes and magnitudes (normal, sigma 0.02; norms 1), for measuring without a checkpoint."""
    weights, parts = _allocate(config, device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for tensor in parts.values():
        if tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 0.02, generator=generator)
    return weights


def _allocate(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[ModelWeights, dict[str, Tensor]]:
    """Uninitialised weights, and by the name of each tensor in the files the part of them that it fills."""
    parts: dict[str, Tensor] = {}

    def single(name: str, *shape: int) -> Tensor:
        parts[name] = torch.empty(shape, dtype=dtype, device=device)
        return parts[name]

    def merged(prefix: str, group: TargetGroup, *rest: int) -> Tensor:
        module = f"{prefix}.{'mlp' if group in (GATE_UP, DOWN) else 'self_attn'}"
        sizes = config.linear_shape.group_outputs(group)
        whole = torch.empty(sum(sizes), *rest, dtype=dtype, device=device)
        for target, part in zip(group.targets, whole.split_with_sizes(sizes), strict=True):
            parts[f"{module}.{target}.{'weight' if rest else 'bias'}"] = part
        return whole

    def layer(prefix: str) -> LayerWeights:
        inputs = {group: config.linear_shape.group_input(group) for group in GROUPS}
        return LayerWeights(
            input_norm=single(f"{prefix}.input_layernorm.weight", config.hidden_size),
            qkv=merged(prefix, QKV, inputs[QKV]),
            qkv_bias=merged(prefix, QKV) if config.qkv_bias else None,
            q_norm=single(f"{prefix}.self_attn.q_norm.weight", config.head_dim) if config.qk_norm else None,
            k_norm=single(f"{prefix}.self_attn.k_norm.weight", config.head_dim) if config.qk_norm else None,
            o=merged(prefix, O, inputs[O]),
            o_bias=merged(prefix, O) if config.o_bias else None,
            post_attention_norm=single(f"{prefix}.post_attention_layernorm.weight", config.hidden_size),
            gate_up=merged(prefix, GATE_UP, inputs[GATE_UP]),
            gate_up_bias=merged(prefix, GATE_UP) if config.mlp_bias else None,
            down=merged(prefix, DOWN, inputs[DOWN]),
            down_bias=merged(prefix, DOWN) if config.mlp_bias else None,
        )

    embedding = single("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers = [layer(f"model.layers.{i}") for i in range(config.num_layers)]
    norm = single("model.norm.weight", config.hidden_size)
    tied = config.tie_word_embeddings
    lm_head = embedding if tied else single("lm_head.weight", config.vocab_size, config.hidden_size)
    return ModelWeights(embedding, layers, norm, lm_head), parts


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()), key=str)
        except (ValueError, KeyError, AttributeError, TypeError, OSError):
            raise ModelError(f"{index} cannot be read; expected a JSON object with a weight_map.") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                raise ModelError(f"{index} lists {name!r}, which is not a file in {folder}.")
        return [folder / name for name in names]
    whole = folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    found = f"only {_some(pickled)}, and pickled weights are not loaded" if pickled else "no weights"
    raise ModelError(
        f"{folder} has {found}; expected model.safetensors or model.safetensors.index.json with its shards."
    )


def _check(name: str, target: Tensor, shape: list[int], dtype: str) -> None:
    if list(target.shape) != shape:
        raise ModelError(f"The tensor {name} has shape {shape}; config.json implies {list(target.shape)}.")
    if dtype not in FLOATS:
        raise ModelError(f"The tensor {name} has dtype {dtype}; expected one of {', '.join(sorted(FLOATS))}.")


def _ignored(name: str, config: ModelConfig) -> bool:
    """Tensors that carry nothing: rotary buffers of old checkpoints, and a head that is tied to the embedding."""
    return name.endswith(".rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


def _some(names: Iterable[str]) -> str:
    """At most four names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
    return ", ".join(listed[:4]) + more
