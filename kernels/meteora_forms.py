"""MeteoRA's own forms of a linear's low-rank update, as arXiv 2405.13053 and its released code describe them.

They are what our kernels are measured against; nothing serves with them. All take x [T, in], the chosen adapters
int64[T, k] and their weights [T, k] and give [T, out]. An adapter's scale is 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

PARTS = 16
"""Rows that the published kernel makes of one token, since a product on tensor cores takes no fewer."""

COLUMNS = 128
"""Outputs of one of its programs, and inputs that each of the PARTS rows takes at a time."""


def single(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One adapter for all rows: a [in, r], b [r, out]."""
    return x @ a @ b


def choose(x: Tensor, gates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k adapters of highest logit and the softmax of these logits, for gates [n, in]."""
    logits, chosen = functional.linear(x, gates).topk(k, dim=-1)
    return chosen, logits.float().softmax(dim=-1).to(x.dtype)


def loop(x: Tensor, a: Tensor, b: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Adapter by adapter, as Mixtral's experts: find its tokens, two products, add to their rows.

    a [n, in, r], b [n, r, out]. The host waits for every adapter's list of tokens.
    """
    out = x.new_zeros(len(x), b.shape[2])
    places = functional.one_hot(chosen, len(a)).permute(2, 1, 0)
    for adapter in range(len(a)):
        choice, token = torch.where(places[adapter])
        update = x[token] @ a[adapter] @ b[adapter]
        out.index_add_(0, token, update * weights[token, choice, None])
    return out


def bmm_torch(x: Tensor, a: Tensor, b: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Batched products with copies of the factors that every token chose. a [n, in, r], b [n, r, out]."""
    rows, k = chosen.shape
    flat = chosen.flatten()
    ranks = torch.bmm(x.repeat_interleave(k, dim=0)[:, None], a[flat])
    updates = torch.bmm(ranks, b[flat])[:, 0] * weights.flatten()[:, None]
    return updates.view(rows, k, -1).sum(dim=1)


def split_factor(a: Tensor) -> Tensor:
    """[n, in / PARTS, PARTS * r] of a [n, in, r]: the parts of the inputs side by side, as `bmm_triton` takes them."""
    n, inputs, rank = a.shape
    return a.view(n, PARTS, inputs // PARTS, rank).transpose(1, 2).reshape(n, inputs // PARTS, PARTS * rank)


@triton.jit
def bmm_kernel(
    x: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    chosen: tl.tensor,
    updates: tl.tensor,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """updates[token * K + choice] = x[token] A B of the chosen adapter. Grid: (T * K, blocks of outputs).

    x as [PARTS, WIDTH] times the split A has the wanted products in the blocks of its diagonal. A mask keeps these, a
    product with stacked identities brings them below each other, and the rows of the product with B are summed.
    """
    pair = tl.program_id(0).to(tl.int64)
    adapter = tl.load(chosen + pair)
    part = tl.arange(0, PARTS)
    column = tl.arange(0, PARTS * RANK)
    x_at = x + pair // K * (PARTS * WIDTH) + part * WIDTH
    a_at = a + adapter * (WIDTH * PARTS * RANK)
    total = tl.zeros([PARTS, PARTS * RANK], tl.float32)
    for first in range(0, WIDTH, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        own = tl.load(x_at[:, None] + k[None, :], mask=(k < WIDTH)[None, :], other=0.0)
        factor = tl.load(a_at + k[:, None] * (PARTS * RANK) + column[None, :], mask=(k < WIDTH)[:, None], other=0.0)
        total = tl.dot(own, factor, total, input_precision="ieee")
    diagonal = tl.where(column[None, :] // RANK == part[:, None], total, 0.0).to(b.dtype.element_ty)
    rank = tl.arange(0, 16)  # the least that a product takes
    stacked = (column[:, None] % RANK == rank[None, :]).to(b.dtype.element_ty)
    ranks = tl.dot(diagonal, stacked, input_precision="ieee").to(b.dtype.element_ty)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_at = b + adapter * (RANK * OUTPUTS) + rank[:, None] * OUTPUTS + n[None, :]
    own = tl.load(b_at, mask=(rank < RANK)[:, None] & (n < OUTPUTS)[None, :], other=0.0)
    out = tl.sum(tl.dot(ranks, own, input_precision="ieee"), axis=0)
    tl.store(updates + pair * OUTPUTS + n, out.to(updates.dtype.element_ty), mask=n < OUTPUTS)


def bmm_triton(x: Tensor, a: Tensor, b: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """`bmm_torch` in one kernel without copies. a from `split_factor`, b [n, r, out]; r is 1, 2, 4 or 8."""
    rows, k = chosen.shape
    rank, outputs = b.shape[1:]
    if rank not in (1, 2, 4, 8):
        raise ValueError(f"the rank is {rank}, expected 1, 2, 4 or 8")
    updates = x.new_empty(rows * k, outputs)
    bmm_kernel[rows * k, triton.cdiv(outputs, COLUMNS)](
        x,
        a,
        b,
        chosen.contiguous(),
        updates,
        K=k,
        WIDTH=x.shape[1] // PARTS,
        OUTPUTS=outputs,
        RANK=rank,
        PARTS=PARTS,
        BLOCK_K=min(COLUMNS, max(16, triton.next_power_of_2(x.shape[1] // PARTS))),
        BLOCK_N=COLUMNS,
        num_warps=8,
        num_stages=4,
    )
    return (updates * weights.flatten()[:, None]).view(rows, k, outputs).sum(dim=1)
