"""Greedy tokens and the ids of the next step, without leaving the GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

CHUNK = 8192
"""Logits a program of `greedy`: 16 programs a row of 128256, so that one row alone uses 16 SMs, not one."""

IDS_BLOCK = 256
"""Ids a program of `input_ids`."""


@triton.jit(do_not_specialize=["words"])
def greedy_kernel(
    logits, masks, maxima, indices, words, V: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr, PDL: tl.constexpr
):
    """The maximum of chunk j of row i and its lowest index, program (j, i); NaN counts as infinite.

    MASKED: only of the tokens whose bit is set among the row's `words`.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(logits + row * V + columns, columns < V, other=-float("inf")).to(tl.float32)
    values = tl.where(values != values, float("inf"), values)
    if MASKED:
        bits = tl.load(masks + row * words + columns // 32, columns < V, other=0) >> (columns % 32)
        values = tl.where(bits & 1 != 0, values, -float("inf"))
    highest = tl.max(values, axis=0)
    index = tl.min(tl.where(values == highest, columns, V), axis=0)
    partial = row * tl.num_programs(0) + chunk
    tl.store(maxima + partial, highest)
    tl.store(indices + partial, index)


@triton.jit
def greedy_combine_kernel(maxima, indices, out, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The token of one row out of its chunks."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, BLOCK)
    mask = chunks < CHUNKS
    values = tl.load(maxima + row * CHUNKS + chunks, mask, other=-float("inf"))
    columns = tl.load(indices + row * CHUNKS + chunks, mask, other=2147483647)
    highest = tl.max(values, axis=0)
    index = tl.min(tl.where(values == highest, columns, 2147483647), axis=0)
    finite = (highest < float("inf")) & (highest > -float("inf"))
    tl.store(out + row, tl.where(finite, index, -1).to(tl.int64))


def greedy(logits: Tensor, masks: Tensor | None = None, *, pdl: bool = False) -> Tensor:
    """int64[R]: the lowest index of the maximum of every row of logits [R, V] (bf16, fp16 or fp32).

    masks: None, or int32[R, at least V / 32]; only tokens t count with bit t % 32 of word t // 32 set.
    -1 for a row that has NaN or whose maximum is not finite.
    """
    rows, size = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return out
    chunk = min(CHUNK, triton.next_power_of_2(size))
    chunks = triton.cdiv(size, chunk)
    maxima = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
    indices = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    greedy_kernel[(chunks, rows)](
        logits.contiguous(),
        None if masks is None else masks.contiguous(),
        maxima,
        indices,
        0 if masks is None else masks.shape[1],
        V=size,
        CHUNK=chunk,
        MASKED=masks is not None,
        PDL=pdl,
        num_warps=8,
        launch_pdl=pdl,
    )
    block = triton.next_power_of_2(chunks)
    greedy_combine_kernel[(rows,)](
        maxima, indices, out, CHUNKS=chunks, BLOCK=block, PDL=pdl, num_warps=1, launch_pdl=pdl
    )
    return out


@triton.jit(do_not_specialize=["tokens"])
def input_ids_kernel(ids, sources, sampled, out, tokens, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """BLOCK tokens."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = token < tokens
    source = tl.load(sources + token, mask, other=-1)
    given = tl.load(ids + token, mask, other=0).to(tl.int64)
    drawn = tl.load(sampled + source, mask & (source >= 0), other=0)
    tl.store(out + token, tl.where(source < 0, given, tl.maximum(drawn, 0)), mask)


def input_ids(ids: Tensor, sources: Tensor, sampled: Tensor, *, pdl: bool = False) -> Tensor:
    """int64[T]: ids[t] where sources[t] < 0, else max(sampled[sources[t]], 0), the token that the last step drew.

    ids, sources int32[T]; sampled int64[M], negative for a row without a token.
    """
    out = torch.empty(len(ids), dtype=torch.int64, device=ids.device)
    if len(ids) == 0:
        return out
    input_ids_kernel[(triton.cdiv(len(ids), IDS_BLOCK),)](
        ids, sources, sampled, out, len(ids), BLOCK=IDS_BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl
    )
    return out
