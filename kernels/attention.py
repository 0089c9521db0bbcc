"""Attention over the paged cache on a GPU: the layout of a step, and the launches of the Triton kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import e, log2

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention_kernels import combine_kernel, decode_kernel, prefill_kernel

QUERY_BLOCK = 128
"""Queries of one entry of `PagedMeta.query_blocks`; with G heads to a key head it is cut among G programs."""

PROGRAMS_PER_PROCESSOR = 3
"""Decoding programs that rows are cut into parts for, by multiprocessor: as many as fit one at a time."""

MIN_CHUNK = 128
"""Fewest tokens of a part: less would not pay for reading the queries and for the combination."""

UNSPLIT = 2048
"""Length up to which rows stay whole where there are enough of them: the combination is one launch more."""


@dataclass(frozen=True)
class PagedMeta:
    """Attention layout of one step of T token rows, of which the first D are decoding rows. All tensors int32.

    slots: [T], the cache slot of each new token (block id * block_size + offset); -1 for a padding row.
    tables: [N], the block tables of all sequences, one after the other.
    table_starts: [S], where in `tables` each sequence begins.
    decode_lens: [D], kv length of decoding row i, which is sequence i, with its new token; 0 for a padding row.
    query_blocks: [B, 4], the other rows, as `query_blocks` cuts them; a first column of -1 marks an unused entry.
    longest: no length in this step, or in a replay of its graph, is beyond it.
    """

    slots: Tensor
    tables: Tensor
    table_starts: Tensor
    decode_lens: Tensor
    query_blocks: Tensor
    block_size: int
    longest: int


@dataclass(frozen=True)
class AttentionConfig:
    """Rows of a kernel's product (queries times heads), keys of a tile, warps, and stages of the pipeline.

    Keys are loaded by way of the block table, each with half of the stages: 5 keep two tiles in flight, 3 one.
    """

    rows: int
    tile: int
    warps: int
    stages: int


def decode_config(dtype: torch.dtype, group: int, dim: int) -> AttentionConfig:
    """Shape of the decoding kernel for `group` query heads to a key head, of `dim` elements.

    H200, 64 rows of 400 tokens, 8 key heads of 128, floor 24 us: 31.5 us; 39 with 5 stages, 31 with tiles of 32, which
    take 100 instead of 83 us where one of the rows has 30,000 tokens.
    """
    rows = max(16, triton.next_power_of_2(group))
    if dtype == torch.float32 or dim > 128:
        return AttentionConfig(rows, 32, 4, 3)
    return AttentionConfig(rows, 64 if dim > 64 else 128, 4, 3)


def prefill_config(dtype: torch.dtype, group: int, dim: int) -> AttentionConfig:
    """Shape of the prefill kernel: 128 rows fill the products of two warp groups on sm_90."""
    packed = triton.next_power_of_2(group)
    if dtype == torch.float32:
        return AttentionConfig(max(16, packed), 16, 4, 1)
    if dim > 128:  # more stages would not fit into the 99 KiB of sm_86 and sm_89
        return AttentionConfig(max(64, packed), 32, 4, 3)
    return AttentionConfig(max(128, packed), 64, 8, 5)


def query_blocks(spans: Sequence[tuple[int, int, int, int]]) -> NDArray[np.int32]:
    """Cut (sequence, first row in the batch, new tokens, tokens before them) into int32[B, 4] for `PagedMeta`.

    Columns: sequence, first row, queries (at most QUERY_BLOCK), position of the first query in the sequence.
    Those that read most keys come first, so that the last programs to start are short ones.
    """
    cut = [
        (sequence, row + offset, min(QUERY_BLOCK, count - offset), past + offset)
        for sequence, row, count, past in spans
        for offset in range(0, count, QUERY_BLOCK)
    ]
    cut.sort(key=lambda block: -block[3] - block[2])
    return np.array(cut, dtype=np.int32).reshape(-1, 4)


def plan_parts(rows: int, kv_heads: int, longest: int, processors: int) -> int:
    """Into how many parts, beyond one a row, the keys of `rows` decoding rows are cut; 0: no row is cut.

    It depends on capacities alone, so that it holds for every replay of a captured graph; which row gets how many
    parts is decided on the device, from the lengths.
    """
    if longest <= MIN_CHUNK or (longest <= UNSPLIT and rows * kv_heads >= 2 * processors):
        return 0
    return max(1, PROGRAMS_PER_PROCESSOR * processors // kv_heads)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: PagedMeta,
    scale: float,
    window: int | None,
    *,
    pdl: bool = False,
) -> Tensor:
    """Causal attention of q [T, heads, D] over the last `window` cached tokens of its sequence -> [T, heads, D].

    k_cache, v_cache: [blocks, block_size, kv heads, D], blocks any stride apart, with the new tokens stored already.
    scale: positive. No key beyond a sequence's length is read. Decoding rows of length 0 become 0, rows of no sequence
    are not written. Repeatable bit by bit; where rows are cut (`plan_parts`), the lengths of others decide where.
    `pdl`: every kernel starts beside the one before it in the stream and waits for it (sm_90).
    Raises ValueError where the layout of a tensor is another one.
    """
    _check(q, k_cache, v_cache, meta)
    reach = window if window is not None and window < meta.longest else 0
    out = torch.empty_like(q)
    if meta.decode_lens.shape[0]:
        _decode(q, k_cache, v_cache, meta, scale, reach, out, pdl)
    if meta.query_blocks.shape[0]:
        _prefill(q, k_cache, v_cache, meta, scale, reach, out, pdl)
    return out


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: PagedMeta) -> None:
    kv_heads, dim = k_cache.shape[2:]
    if not q.is_contiguous() or q.shape[2] != dim or q.shape[1] % kv_heads:
        raise ValueError(f"q must be contiguous, [T, n * {kv_heads}, {dim}], not {tuple(q.shape)}")
    inner = (kv_heads * dim, dim, 1)
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride() or k_cache.stride()[1:] != inner:
        raise ValueError("k_cache and v_cache must have one shape, and contiguous blocks")
    if k_cache.shape[1] != meta.block_size:
        raise ValueError(f"the caches have blocks of {k_cache.shape[1]} tokens, the layout of {meta.block_size}")
    if len(meta.decode_lens) > len(q):
        raise ValueError(f"{len(meta.decode_lens)} decoding rows are more than the {len(q)} rows of q")


def _layout(q: Tensor, k_cache: Tensor, window: int, pdl: bool) -> dict[str, int | bool]:
    """Constants that the kernels share."""
    heads, dim = q.shape[1:]
    return {
        "HEADS": heads,
        "GROUP": heads // k_cache.shape[2],
        "DIM": dim,
        "WIDTH": max(16, triton.next_power_of_2(dim)),
        "BLOCK": k_cache.shape[1],
        "BLOCK_STRIDE": k_cache.stride(0),
        "TOKEN_STRIDE": k_cache.stride(1),
        "WINDOW": window,
        "PDL": pdl,
    }


def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; one for Triton's interpreter, which runs programs one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: PagedMeta, scale: float, window: int, out: Tensor, pdl: bool
) -> None:
    rows, heads, dim = meta.decode_lens.shape[0], *q.shape[1:]
    kv_heads = k_cache.shape[2]
    longest = min(meta.longest, window) if window else meta.longest
    parts = plan_parts(rows, kv_heads, longest, _processors(q.device))
    config = decode_config(q.dtype, heads // kv_heads, dim)
    layout = _layout(q, k_cache, window, pdl)
    items = rows + parts
    partials = logsums = row_parts = out  # of no use where no row is cut
    if parts:
        partials = torch.empty(items, heads, dim, dtype=torch.float32, device=q.device)
        logsums = torch.empty(items, heads, dtype=torch.float32, device=q.device)
        row_parts = torch.empty(rows, 2, dtype=torch.int32, device=q.device)
    decode_kernel[kv_heads, items](
        q,
        k_cache,
        v_cache,
        out,
        partials,
        logsums,
        row_parts,
        meta.tables,
        meta.table_starts,
        meta.decode_lens,
        rows,
        scale * log2(e),
        **layout,
        PARTS=parts,
        MIN_CHUNK=MIN_CHUNK,
        ROWS=triton.next_power_of_2(rows),
        PACKED=config.rows,
        TILE=config.tile,
        num_warps=config.warps,
        num_stages=config.stages,
        launch_pdl=pdl,
    )
    if parts:
        sizes = {name: layout[name] for name in ("HEADS", "DIM", "WIDTH", "PDL")}
        combine_kernel[heads, rows](partials, logsums, row_parts, out, **sizes, num_warps=2, launch_pdl=pdl)


def _prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: PagedMeta, scale: float, window: int, out: Tensor, pdl: bool
) -> None:
    kv_heads = k_cache.shape[2]
    group = q.shape[1] // kv_heads
    packed = triton.next_power_of_2(group)
    config = prefill_config(q.dtype, group, q.shape[2])
    queries = min(config.rows // packed, QUERY_BLOCK)
    prefill_kernel[kv_heads, QUERY_BLOCK // queries, meta.query_blocks.shape[0]](
        q,
        k_cache,
        v_cache,
        out,
        meta.tables,
        meta.table_starts,
        meta.query_blocks,
        scale * log2(e),
        **_layout(q, k_cache, window, pdl),
        PACKED=packed,
        QUERIES=queries,
        TILE=config.tile,
        num_warps=config.warps,
        num_stages=config.stages,
        launch_pdl=pdl,
    )
