"""Triton kernels of attention over the paged cache: decoding rows split over their keys, and chunks of prompts.

Both are flash attention (Dao 2023): keys in tiles, an online softmax in base 2 with log2(e) folded into the scale,
sums in fp32. All query heads that share a key head are the rows of one product, so every key is read once.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOWEST = tl.constexpr(-1e30)
"""First maximum of an online softmax: finite, so that a tile without any visible key (all -inf) makes no NaN."""

COMBINED = tl.constexpr(16)
"""Parts that the combination reads at a time."""


@triton.jit
def _partition(
    decode_lens: tl.tensor,
    rows: tl.tensor,
    PARTS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(row indices [ROWS], parts of each row, tokens of a part).

    All parts of all rows are of one size, about a PARTS-th of all tokens: a long row among short ones gets many, and
    there are at most rows + PARTS of them. A row has at least one, so that it is written even when it is empty.
    """
    index = tl.arange(0, ROWS)
    lens = tl.load(decode_lens + index, mask=index < rows, other=0)
    if WINDOW > 0:
        lens = tl.minimum(lens, WINDOW)
    chunk = tl.maximum(tl.cdiv(tl.sum(lens, 0), PARTS * TILE) * TILE, MIN_CHUNK)
    parts = tl.where(index < rows, tl.maximum(tl.cdiv(lens, chunk), 1), 0)
    return index, parts, chunk


@triton.jit
def _cache_offsets(
    tables: tl.tensor,
    position: tl.tensor,
    stored: tl.tensor,
    BLOCK: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """int64 offsets of the tokens at `position` in the cache; those not `stored` get the offset of block 0."""
    place = tables + position // BLOCK
    block = tl.load(place, mask=stored, other=0) if MASKED else tl.load(place)
    return block.to(tl.int64) * BLOCK_STRIDE + (position % BLOCK) * TOKEN_STRIDE


@triton.jit
def _load_rows(
    base: tl.tensor, offsets: tl.tensor, kept: tl.tensor, DIM: tl.constexpr, WIDTH: tl.constexpr
) -> tl.tensor:
    """[rows, WIDTH] from `base + offsets`, zero beyond DIM and in rows that are not `kept`."""
    column = tl.arange(0, WIDTH)
    mask = kept[:, None]
    if WIDTH != DIM:
        mask = mask & (column < DIM)[None, :]
    return tl.load(base + offsets[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _load_tile(
    base: tl.tensor,
    offsets: tl.tensor,
    stored: tl.tensor,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """[keys, WIDTH] of one cache, unmasked where all keys are stored and the head dimension is not padded."""
    if MASKED or WIDTH != DIM:
        return _load_rows(base, offsets, stored, DIM, WIDTH)
    return tl.load(base + offsets[:, None] + tl.arange(0, WIDTH)[None, :])


@triton.jit
def _absorb(
    scores: tl.tensor, scale: tl.tensor, v: tl.tensor, top: tl.tensor, total: tl.tensor, acc: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One step of the online softmax in base 2: scores [M, keys] and v [keys, W] into (maximum, sum, weighted sum)."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    shrink = tl.exp2(top - new_top)
    weights = tl.exp2(scores * scale - new_top[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit(do_not_specialize=["rows"])
def decode_kernel(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    out: tl.tensor,
    partials: tl.tensor,
    logsums: tl.tensor,
    row_parts: tl.tensor,
    tables: tl.tensor,
    table_starts: tl.tensor,
    decode_lens: tl.tensor,
    rows: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    PARTS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One part of one row, for all GROUP query heads (padded to PACKED) of one key head: grid (key heads, parts).

    PARTS 0: a row is one part. The only part of a row is written to `out`, others to fp32 `partials` [parts, HEADS,
    DIM] with their log2 sums of exponentials in `logsums` [parts, HEADS]. `row_parts` [rows, 2] becomes the first part
    of each row and their number.
    """
    if PDL:
        gdc_launch_dependents()
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    row = item
    part = 0
    count = 1
    chunk = 0
    if PARTS > 0:
        index, parts, chunk = _partition(decode_lens, rows, PARTS, MIN_CHUNK, WINDOW, ROWS, TILE)
        row = tl.sum((tl.cumsum(parts, 0) <= item).to(tl.int32), 0)
        part = item - tl.sum(tl.where(index < row, parts, 0), 0)
        count = tl.sum(tl.where(index == row, parts, 0), 0)
    if PDL:
        gdc_wait()
    if count == 0:
        return
    length = tl.load(decode_lens + row)
    tables += tl.load(table_starts + row)
    start = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    stop = length
    if PARTS > 0:
        start += part * chunk
        stop = tl.minimum(start + chunk, length)
        if part + kv_head == 0:
            tl.store(row_parts + row * 2, item)
            tl.store(row_parts + row * 2 + 1, count)

    member = tl.arange(0, PACKED)
    head = kv_head * GROUP + member
    queries = _load_rows(q + row.to(tl.int64) * (HEADS * DIM), head * DIM, member < GROUP, DIM, WIDTH)
    k_cache += kv_head * DIM
    v_cache += kv_head * DIM
    top = tl.full([PACKED], LOWEST, tl.float32)
    total = tl.zeros([PACKED], tl.float32)
    acc = tl.zeros([PACKED, WIDTH], tl.float32)
    for first in tl.range(start, stop, TILE):
        position = first + tl.arange(0, TILE)
        stored = position < stop
        offsets = _cache_offsets(tables, position, stored, BLOCK, BLOCK_STRIDE, TOKEN_STRIDE, True)
        k = _load_tile(k_cache, offsets, stored, DIM, WIDTH, True)
        v = _load_tile(v_cache, offsets, stored, DIM, WIDTH, True)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        scores = tl.where(stored[None, :], scores, float("-inf"))
        top, total, acc = _absorb(scores, scale, v, top, total, acc)

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    column = tl.arange(0, WIDTH)
    mask = (member < GROUP)[:, None] & (column < DIM)[None, :]
    place = head[:, None] * DIM + column[None, :]
    if count == 1:
        tl.store(out + row.to(tl.int64) * (HEADS * DIM) + place, acc.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(partials + item.to(tl.int64) * (HEADS * DIM) + place, acc, mask=mask)
        tl.store(logsums + item * HEADS + head, top + tl.log2(total), mask=member < GROUP)


@triton.jit
def combine_kernel(
    partials: tl.tensor,
    logsums: tl.tensor,
    row_parts: tl.tensor,
    out: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Sums the parts of every row that has more than one, in their order: grid (heads, rows)."""
    if PDL:
        gdc_launch_dependents()
        # Also where there is nothing to do: whatever waits for this grid must have waited for the one before.
        gdc_wait()
    head = tl.program_id(0)
    row = tl.program_id(1)
    before = tl.load(row_parts + row * 2)
    count = tl.load(row_parts + row * 2 + 1)
    if count == 1:
        return
    column = tl.arange(0, WIDTH)
    top = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([WIDTH], tl.float32)
    for first in range(0, count, COMBINED):
        part = first + tl.arange(0, COMBINED)
        kept = part < count
        place = (before + part).to(tl.int64) * HEADS + head
        logsum = tl.load(logsums + place, mask=kept, other=float("-inf"))
        values = _load_rows(partials, place * DIM, kept, DIM, WIDTH)
        new_top = tl.maximum(top, tl.max(logsum, 0))
        shrink = tl.exp2(top - new_top)
        weights = tl.exp2(logsum - new_top)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(weights[:, None] * values, 0)
        top = new_top
    place = (row.to(tl.int64) * HEADS + head) * DIM + column
    tl.store(out + place, (acc / total).to(out.dtype.element_ty), mask=column < DIM)


@triton.jit
def prefill_kernel(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    out: tl.tensor,
    tables: tl.tensor,
    table_starts: tl.tensor,
    query_blocks: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    PACKED: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """QUERIES queries of a block, times the GROUP heads (padded to PACKED) of one key head: grid (key heads, parts of
    a block, blocks). Tiles that every query sees whole are neither masked nor tested."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    kv_head = tl.program_id(0)
    skipped = tl.program_id(1) * QUERIES
    query_blocks += tl.program_id(2) * 4
    sequence = tl.load(query_blocks)
    count = tl.load(query_blocks + 2) - skipped
    if sequence < 0 or count <= 0:
        return
    first_row = tl.load(query_blocks + 1) + skipped
    first_position = tl.load(query_blocks + 3) + skipped
    tables += tl.load(table_starts + sequence)

    member = tl.arange(0, QUERIES * PACKED)
    query = member // PACKED
    kept = (query < count) & (member % PACKED < GROUP)
    head = kv_head * GROUP + member % PACKED
    place = (first_row + query).to(tl.int64) * (HEADS * DIM) + head * DIM
    queries = _load_rows(q, place, kept, DIM, WIDTH)
    query_position = first_position + query
    k_cache += kv_head * DIM
    v_cache += kv_head * DIM
    top = tl.full([QUERIES * PACKED], LOWEST, tl.float32)
    total = tl.zeros([QUERIES * PACKED], tl.float32)
    acc = tl.zeros([QUERIES * PACKED, WIDTH], tl.float32)

    stop = first_position + tl.minimum(count, QUERIES)
    masked_from = (first_position + 1) // TILE * TILE
    if WINDOW > 0:
        masked_from = tl.maximum(first_position + 1 - WINDOW, 0) // TILE * TILE
    else:
        for first in tl.range(0, masked_from, TILE):
            position = first + tl.arange(0, TILE)
            stored = position < stop
            offsets = _cache_offsets(tables, position, stored, BLOCK, BLOCK_STRIDE, TOKEN_STRIDE, False)
            k = _load_tile(k_cache, offsets, stored, DIM, WIDTH, False)
            v = _load_tile(v_cache, offsets, stored, DIM, WIDTH, False)
            scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
            top, total, acc = _absorb(scores, scale, v, top, total, acc)
    for first in tl.range(masked_from, stop, TILE):
        position = first + tl.arange(0, TILE)
        stored = position < stop
        offsets = _cache_offsets(tables, position, stored, BLOCK, BLOCK_STRIDE, TOKEN_STRIDE, True)
        k = _load_tile(k_cache, offsets, stored, DIM, WIDTH, True)
        v = _load_tile(v_cache, offsets, stored, DIM, WIDTH, True)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
        seen = position[None, :] <= query_position[:, None]
        if WINDOW > 0:
            seen = seen & (position[None, :] > query_position[:, None] - WINDOW)
        top, total, acc = _absorb(tl.where(seen, scores, float("-inf")), scale, v, top, total, acc)

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    column = tl.arange(0, WIDTH)
    mask = kept[:, None] & (column < DIM)[None, :]
    tl.store(out + place[:, None] + column[None, :], acc.to(out.dtype.element_ty), mask=mask)
