"""From the output of the query, key and value projections to rotated queries and filled caches, in one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.summands import Summands

HEADS = 8
WARPS = 2
"""Heads and warps of a program: half of 8 heads of size 128 is one load of 16 bytes a thread, and 48 heads of a token
are 6 programs."""


@triton.jit
def _load_half(qkv, delta, offsets, mask):
    """fp32[HEADS, HALF]"""
    values = tl.load(qkv + offsets, mask, other=0.0).to(tl.float32)
    if delta is not None:
        values += tl.load(delta + offsets, mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def _store_half(q, k_cache, v_cache, values, head, column, mask, token, slot, H, KV, D, K_STRIDE, V_STRIDE):
    """Values [HEADS, HALF] of heads `head` [HEADS, 1] to where each belongs; keys and values at slot -1 nowhere."""
    stored = values.to(q.dtype.element_ty)
    tl.store(q + (token * H + head) * D + column, stored, mask & (head < H))
    mask = mask & (slot >= 0)
    is_key = (head >= H) & (head < H + KV)
    tl.store(k_cache + slot * K_STRIDE + (head - H) * D + column, stored, mask & is_key)
    tl.store(v_cache + slot * V_STRIDE + (head - H - KV) * D + column, stored, mask & (head >= H + KV))


@triton.jit
def rotary_store_kernel(
    qkv,
    delta,
    qk_norm,
    cos,
    sin,
    slots,
    q,
    k_cache,
    v_cache,
    eps,
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    K_STRIDE: tl.constexpr,
    V_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    """Heads [HEADS * j, HEADS * (j + 1)) of token i, program (j, i); HALF is D / 2 or the next power of two."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = column < D // 2
    mask = inside & (head < H + 2 * KV)
    rotated = head < H + KV
    offsets = (token * (H + 2 * KV) + head) * D + column
    low = _load_half(qkv, delta, offsets, mask)
    high = _load_half(qkv, delta, offsets + D // 2, mask)
    if qk_norm is not None:
        dtype = q.dtype.element_ty
        squares = tl.sum(low * low, axis=1, keep_dims=True) + tl.sum(high * high, axis=1, keep_dims=True)
        inverse = tl.where(rotated, tl.rsqrt(squares / D + eps), 1.0)
        factors = qk_norm + head * D + column
        low_factors = tl.load(factors, mask & rotated, other=1.0).to(tl.float32)
        high_factors = tl.load(factors + D // 2, mask & rotated, other=1.0).to(tl.float32)
        low = ((low * inverse).to(dtype).to(tl.float32) * low_factors).to(dtype).to(tl.float32)
        high = ((high * inverse).to(dtype).to(tl.float32) * high_factors).to(dtype).to(tl.float32)
    angles = token * D + column
    low_cos = tl.load(cos + angles, inside, other=0.0).to(tl.float32)
    low_sin = tl.load(sin + angles, inside, other=0.0).to(tl.float32)
    high_cos = tl.load(cos + angles + D // 2, inside, other=0.0).to(tl.float32)
    high_sin = tl.load(sin + angles + D // 2, inside, other=0.0).to(tl.float32)
    new_low = tl.where(rotated, low * low_cos + high * low_sin, low)
    new_high = tl.where(rotated, high * high_cos + low * high_sin, high)
    _store_half(q, k_cache, v_cache, new_low, head, column, mask, token, slot, H, KV, D, K_STRIDE, V_STRIDE)
    _store_half(q, k_cache, v_cache, new_high, head, column + D // 2, mask, token, slot, H, KV, D, K_STRIDE, V_STRIDE)


def rotary_store(
    qkv: Summands,
    qk_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    num_heads: int,
    num_kv_heads: int,
    *,
    pdl: bool = False,
) -> Tensor:
    """Rotated queries [T, num_heads, D]; rotated keys and values go into the caches at `slots`.

    qkv [T, (num_heads + 2 * num_kv_heads) * D]: queries, keys, values. qk_norm [num_heads + num_kv_heads, D] or None:
    each head of the queries and keys is first normalised as by `rms_norm` with `eps`. cos, sin [T, D] as those of
    `kernels.reference.rotary`. Caches [blocks, block_size, num_kv_heads, D]; slots int32[T], block * block_size +
    offset, or -1 for a token that is not stored. Rotates in fp32 and rounds once.
    Raises ValueError for a cache whose slots are not evenly spaced.
    """
    y, delta = qkv
    tokens, size = len(y), k_cache.shape[-1]
    q = torch.empty(tokens, num_heads, size, dtype=y.dtype, device=y.device)
    if tokens == 0:
        return q
    rotary_store_kernel[(triton.cdiv(num_heads + 2 * num_kv_heads, HEADS), tokens)](
        y.contiguous(),
        None if delta is None else delta.contiguous(),
        None if qk_norm is None else qk_norm.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        slots,
        q,
        k_cache,
        v_cache,
        eps,
        H=num_heads,
        KV=num_kv_heads,
        D=size,
        K_STRIDE=_slot_stride(k_cache),
        V_STRIDE=_slot_stride(v_cache),
        HEADS=HEADS,
        HALF=triton.next_power_of_2(size // 2),
        PDL=pdl,
        num_warps=WARPS,
        launch_pdl=pdl,
    )
    return q


def _slot_stride(cache: Tensor) -> int:
    """Elements from one slot to the next."""
    stride = cache.stride(1)
    if cache.stride() != (cache.shape[1] * stride, stride, cache.shape[3], 1):
        raise ValueError(f"a cache must have evenly spaced slots of contiguous heads, not strides {cache.stride()}")
    return stride
