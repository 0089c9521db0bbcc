"""The parts of a decoder layer: rotary embedding, attention, feed-forward network."""

import math

import torch
from torch import Tensor

from adapters_store.types import DOWN, GATE_UP, QKV, O
from kernels.ops import Attention as AttentionLayout
from kernels.ops import Ops
from kernels.summands import Summands
from server.model.config import ModelConfig, RopeConfig
from server.model.lora import LoraContext, LoraLinear
from server.model.weights import LayerWeights


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """fp32[head_dim / 2], radians a token (Su et al. 2021, section 3.2.2), scaled as `rope` says."""
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3_frequencies(frequencies, rope)
    return frequencies


def _llama3_frequencies(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: keep short wavelengths, divide long ones by `factor`, interpolate linearly in frequency between."""
    turns = rope.original_max_position * frequencies / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / rope.factor


class RotaryEmbedding:
    """cos and sin of every position, computed in fp32 as far as they have been needed."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.frequencies = inverse_frequencies(config.rope, config.head_dim)
        self.max_length = config.max_position_embeddings
        self.device = device
        self.dtype = dtype
        self.table = torch.empty(2, 0, config.head_dim, dtype=dtype, device=device)

    def __call__(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin [T, head_dim] of positions int64[T], all below `length`; signs as `Ops.rotary` wants them."""
        if length > self.table.shape[1]:
            self.grow(length)
        cos, sin = self.table.index_select(1, positions)
        return cos, sin

    def grow(self, length: int) -> None:
        """Extend the table to at least `length` positions: the next power of two, at most the model's maximum."""
        rows = max(length, min(self.max_length, 1 << (length - 1).bit_length()))
        angles = torch.outer(torch.arange(rows, dtype=torch.float32), self.frequencies)
        cos, sin = angles.cos(), angles.sin()
        table = torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))
        self.table = table.to(self.device, self.dtype)


class Attention:
    """Self-attention of one layer over the paged cache."""

    def __init__(self, config: ModelConfig, layer: int, weights: LayerWeights, ops: Ops) -> None:
        shape = config.linear_shape
        self.qkv = LoraLinear(QKV, shape.group_outputs(QKV), weights.qkv, weights.qkv_bias, ops)
        self.o = LoraLinear(O, shape.group_outputs(O), weights.o, weights.o_bias, ops)
        self.qk_norm = None
        if weights.q_norm is not None and weights.k_norm is not None:
            heads = (weights.q_norm.expand(config.num_heads, -1), weights.k_norm.expand(config.num_kv_heads, -1))
            self.qk_norm = torch.cat(heads)
        self.eps = config.norm_eps
        self.scale = config.head_dim**-0.5
        self.window = config.sliding_windows[layer]
        self.ops = ops

    def __call__(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        meta: AttentionLayout,
        lora: LoraContext,
    ) -> Summands:
        """x [T, hidden] -> [T, hidden]; writes the new keys and values into `cache`."""
        q = self.ops.rotary_store(self.qkv(x, lora), self.qk_norm, self.eps, rotary, cache, meta)
        out = self.ops.paged_attention(q, cache, meta, self.scale, self.window)
        return self.o(out.flatten(1), lora)


class FeedForward:
    """SwiGLU feed-forward network of one layer."""

    def __init__(self, config: ModelConfig, weights: LayerWeights, ops: Ops) -> None:
        shape = config.linear_shape
        self.gate_up = LoraLinear(GATE_UP, shape.group_outputs(GATE_UP), weights.gate_up, weights.gate_up_bias, ops)
        self.down = LoraLinear(DOWN, shape.group_outputs(DOWN), weights.down, weights.down_bias, ops)
        self.ops = ops

    def __call__(self, x: Tensor, lora: LoraContext) -> Summands:
        """x [T, hidden] -> [T, hidden]."""
        return self.down(self.ops.silu_mul(self.gate_up(x, lora)), lora)
