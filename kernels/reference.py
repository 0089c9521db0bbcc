"""The operations in plain torch: the CPU backend, and the specification of every other backend.

Sums accumulate in fp32 and round once to the tensors' dtype. Shapes are those of `kernels.ops.Ops`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kernels.gate_rows import Gated
from kernels.gather import AttentionMeta, KeyPlan
from kernels.mapping import Mapping, ScatteredBlock, SharedBlock
from kernels.summands import Summands
from kernels.tiles import PAGE_RANK

captures = False


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; statistics in fp32 (Zhang and Sennrich 2019)."""
    values = x.float()
    inverse = torch.linalg.vector_norm(values, dim=-1, keepdim=True).square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    normed: Tensor = (values * inverse).to(x.dtype)
    return normed.mul_(weight)


def rms_norm_residual(x: Summands, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); the sum is written into x."""
    total = add(x)
    total += residual
    return rms_norm(total, weight, eps), total


def add(x: Summands) -> Tensor:
    """The sum, written into its first part."""
    y, delta = x
    return y if delta is None else y.add_(delta)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of x [T, heads, D] in the halves convention.

    cos, sin [T, D]; the first half of sin is negated, so that swapping the halves of x is all that is left to do.
    """
    return (x * cos[:, None]).addcmul_(x.roll(x.shape[-1] // 2, -1), sin[:, None])


def rotary_store(
    qkv: Summands,
    qk_norm: Tensor | None,
    eps: float,
    rotary_rows: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    meta: AttentionMeta,
) -> Tensor:
    """Normed, rotated queries [T, heads, D] of qkv [T, (heads + 2 * kv heads) * D]; keys and values go to the cache."""
    kv_heads, size = cache[0].shape[2:]
    heads = add(qkv).unflatten(-1, (-1, size))
    rotated = heads.shape[1] - kv_heads
    qk, v = heads[:, :rotated], heads[:, rotated:]
    if qk_norm is not None:
        qk = rms_norm(qk, qk_norm, eps)
    qk = rotary(qk, *rotary_rows)
    store_kv(qk[:, rotated - kv_heads :], v, *cache, meta)
    return qk[:, : rotated - kv_heads]


def silu_mul(x: Summands) -> Tensor:
    """silu(gate) * up for x [T, 2 * n] = (gate, up) -> [T, n] (Shazeer 2020)."""
    gate, up = add(x).chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def pack_linear(weight: Tensor) -> Tensor:
    """`weight` [out, in] in the layout that `linear` runs fastest with; opaque, and independent of the original.

    fp32 on a CPU goes to oneDNN's blocked layout: on two AVX2 cores 1.2 to 1.9 times faster than the plain product from
    1 to 32 rows (576 -> 3072 at one row 627 -> 310 us), and no slower at 256.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not _has_onednn():
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available()  # type: ignore[no-any-return]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in] @ weight[out, in]^T + bias -> [T, out]; `weight` as it is or from `pack_linear`."""
    if weight.is_mkldnn:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return functional.linear(x, weight, bias)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pages: tuple[Tensor, Tensor],
    mapping: Mapping,
    slices: tuple[int, ...],
    scale: Tensor | Gated | None = None,
) -> Summands:
    """`linear` with the updates of `lora_` already added. Pages may hold anything: no row meets a page of another."""
    assert not isinstance(scale, Gated), "the reference takes weights"
    return lora_(linear(x, weight, bias), x, *pages, mapping, slices, scale), None


def lora_(
    y: Tensor,
    x: Tensor,
    a_pages: Tensor,
    b_pages: Tensor,
    mapping: Mapping,
    slices: tuple[int, ...],
    scale: Tensor | None = None,
) -> Tensor:
    """y[t, slice s] += sum over pages p of M[t, p] * scale[s, t, p] * (x[t] A[p, s]^T) B[p, slice s], in place.

    y [T, sum(slices)], x [T, in]; a_pages [pages, S * 16, in], rows s*16..s*16+15 of a page belong to slice s;
    b_pages [pages, 16, sum(slices)]; scale None or fp32[S, T, len(mapping.pages)].
    """
    total, x = y.float(), x.float()
    for shared in mapping.shared:
        _add_shared(total, x, a_pages, b_pages, shared, slices, scale)
    for scattered in mapping.scattered:
        _add_scattered(total, x, a_pages, b_pages, scattered, slices, scale)
    return y if total is y else y.copy_(total)


def _pages(pool: Tensor, pages: slice | Tensor) -> Tensor:
    """fp32[P, *, *], a view where an fp32 pool has the pages side by side, else a copy."""
    return (pool[pages] if isinstance(pages, slice) else pool.index_select(0, pages)).float()


def _weigh(ranks: Tensor, weights: Tensor, scale: Tensor | None) -> Tensor:
    """ranks [*, S, 16] *= weights [*] * scale [S, *], in place; exactly 0 where scale is 0, were ranks inf or NaN."""
    if scale is None:
        return ranks.mul_(weights[..., None, None])
    factors = (weights * scale).movedim(0, -1)[..., None]
    return ranks.mul_(factors).masked_fill_(factors == 0, 0)


def _add_shared(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, block: SharedBlock, slices: tuple[int, ...], scale: Tensor | None
) -> None:
    rows = slice(block.start, block.stop)
    a, b = _pages(a, block.pages), _pages(b, block.pages).flatten(0, 1)
    if scale is not None:
        scale = scale[:, rows].index_select(2, block.columns)
    ranks = functional.linear(x[rows], a.flatten(0, 1)).view(-1, len(a), len(slices), PAGE_RANK)
    ranks = _weigh(ranks, block.weights, scale)
    for s, (out, b_part) in enumerate(zip(_split(y[rows], slices), _split(b, slices), strict=True)):
        out.addmm_(ranks[:, :, s].flatten(1), b_part)


def _add_scattered(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, block: ScatteredBlock, slices: tuple[int, ...], scale: Tensor | None
) -> None:
    """One product a page with the rows of that page alone: nothing that a page holds can reach another row."""
    rows, a, b = block.rows, _pages(a, block.pages), _pages(b, block.pages)
    if scale is not None:
        scale = scale[:, rows, block.columns[:, None]]
    own = x.index_select(0, rows.flatten()).view(*rows.shape, -1)
    ranks = _weigh(torch.bmm(own, a.transpose(1, 2)).view(*rows.shape, len(slices), PAGE_RANK), block.weights, scale)
    parts = [torch.bmm(ranks[:, :, s], b_part) for s, b_part in enumerate(_split(b, slices))]
    delta = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).flatten(0, 1)
    y.index_add_(0, block.targets, delta if block.kept is None else delta.index_select(0, block.kept))


def _split(whole: Tensor, slices: tuple[int, ...]) -> Sequence[Tensor]:
    """Views of the last dimension's slices."""
    return whole.split_with_sizes(slices, -1) if len(slices) > 1 else (whole,)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta) -> None:
    """Write k, v [T, kv heads, D] into the caches [blocks, block_size, kv heads, D] at `meta.slots`."""
    k_cache.flatten(0, 1).index_copy_(0, meta.slots, k)
    v_cache.flatten(0, 1).index_copy_(0, meta.slots, v)


def paged_attention(
    q: Tensor, cache: tuple[Tensor, Tensor], meta: AttentionMeta, scale: float, window: int | None
) -> Tensor:
    """Causal attention of q [T, heads, D] over the last `window` cached tokens of its sequence -> [T, heads, D].

    Decoding sequences of similar length are one call, with keys padded to the longest; the others follow one by one.
    Query heads that share a key head are taken as further queries or as a broadcast: no key is copied for them.
    """
    out = torch.empty_like(q)
    k_cache, v_cache = cache
    decodes = meta.num_decodes
    for plan in meta.decode_plans(k_cache, window):
        if plan.rows is None:
            out[:decodes] = _decode_attention(q[:decodes], *plan.gather(k_cache, v_cache), plan, scale)
        else:
            part = q.index_select(0, plan.rows)
            out[plan.rows] = _decode_attention(part, *plan.gather(k_cache, v_cache), plan, scale)
    start = decodes
    for sequence in range(decodes, len(meta.query_lens)):
        stop = start + meta.query_lens[sequence]
        plan = meta.prefill_plan(k_cache, sequence, window)
        out[start:stop] = _prefill_attention(q[start:stop], *plan.gather(k_cache, v_cache), plan, scale)
        start = stop
    return out


def greedy(logits: Tensor, masks: Tensor | None = None) -> Tensor:
    """As `kernels.ops.Ops.greedy`."""
    highest, tokens = (logits if masks is None else forbid(logits, masks)).max(dim=-1)
    return torch.where(highest.isfinite(), tokens, -1)


def forbid(logits: Tensor, masks: Tensor) -> Tensor:
    """logits [R, V] with minus infinity for the tokens whose bit in masks, int32[R, at least V / 32], is not set."""
    bits = masks.view(torch.uint8)[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=masks.device) & 1
    return logits.masked_fill((bits == 0).flatten(1)[:, : logits.shape[-1]], -torch.inf)


def _grouped(q: Tensor, kv_heads: int) -> Tensor:
    """q [T, heads, D] -> [T, kv heads, heads that share a key head, D]."""
    return q.view(len(q), kv_heads, q.shape[1] // kv_heads, q.shape[2])


def _decode_attention(q: Tensor, k: Tensor, v: Tensor, plan: KeyPlan, scale: float) -> Tensor:
    """q [N, heads, D], k and v [N, kv heads, M, D]."""
    grouped = _grouped(q, k.shape[1])
    return functional.scaled_dot_product_attention(grouped, k, v, attn_mask=plan.mask, scale=scale).flatten(1, 2)


def _prefill_attention(q: Tensor, k: Tensor, v: Tensor, plan: KeyPlan, scale: float) -> Tensor:
    """q [queries, heads, D] of one sequence, k and v [1, kv heads, M, D]."""
    grouped = _grouped(q, k.shape[1]).permute(1, 2, 0, 3)
    k, v = (part[0, :, None].expand(-1, grouped.shape[1], -1, -1) for part in (k, v))
    out = functional.scaled_dot_product_attention(
        grouped, k, v, attn_mask=plan.mask, is_causal=plan.causal, scale=scale
    )
    return out.permute(2, 0, 1, 3).flatten(1, 2)
