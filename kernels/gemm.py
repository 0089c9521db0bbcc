"""Products of few rows with a large weight, in Triton: limited by reading the weight, and small enough on every SM that
the kernels of the adapters run beside them."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.gemm_table import GemmConfig

MAX_TILES = 4096
"""Tiles of an output whose splits can be counted; larger outputs have tiles enough without splits."""


@triton.jit
def _prefetch(
    weight, first_row, first_column, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Ask for weight[first_row :, first_column :][ROWS, COLUMNS] to be brought into L2."""
    LINE: tl.constexpr = 128 * 8 // weight.dtype.element_ty.primitive_bitwidth
    row = tl.minimum(first_row + tl.arange(0, ROWS), N - 1).to(tl.int64)
    column = tl.minimum(first_column + tl.arange(0, COLUMNS // LINE) * LINE, K - 1)
    address = (weight + row[:, None] * K + column[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _tile(source, first_row, first_column, rows, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE):
    """source[first_row :, first_column :][ROWS, COLUMNS] by pointers: anything below row `rows`, 0 beyond column K.

    WHOLE: no tile reaches beyond column K.
    """
    row = tl.minimum(first_row + tl.arange(0, ROWS), rows - 1).to(tl.int64)
    column = first_column + tl.arange(0, COLUMNS)
    pointers = source + row[:, None] * K + column[None, :]
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, column[None, :] < K, other=0.0)


@triton.jit
def _store(y, bias, acc, row, column, mask, N: tl.constexpr):
    """y[row, column] = acc + bias, rounded."""
    if bias is not None:
        acc += tl.load(bias + column, column < N, other=0.0).to(tl.float32)
    tl.store(y + row.to(tl.int64) * N + column, acc.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def gemm_kernel(
    x,
    weight,
    weight_pointer,
    bias,
    y,
    partials,
    counters,
    rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PREFETCH: tl.constexpr,
    SWAPPED: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """Split j of K of tile i, program (i, j); x and weight are descriptors where TMA is set, else pointers."""
    if PDL:
        gdc_launch_dependents()
    blocks_m = tl.cdiv(rows, BLOCK_M)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    # tiles that share weights are neighbours, so that only the first of them reads from memory
    first_row = (tile % blocks_m) * BLOCK_M
    first_column = (tile // blocks_m) * BLOCK_N
    # as many steps for every split, known when compiling; those beyond K add zeros
    STEPS: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    WHOLE: tl.constexpr = STEPS * BLOCK_K * SPLITS == K
    first = split * STEPS
    if PDL:
        # nobody writes weights: their first tiles are on the way while the kernel before still runs
        if PREFETCH > 0:
            _prefetch(weight_pointer, first_column, first * BLOCK_K, N, K, BLOCK_N, BLOCK_K * PREFETCH)
        gdc_wait()
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_N), tl.float32)
    for i in range(STEPS):
        step = first + i
        if TMA:
            a = x.load([first_row, step * BLOCK_K])
            b = weight.load([first_column, step * BLOCK_K])
        else:
            a = _tile(x, first_row, step * BLOCK_K, rows, K, BLOCK_M, BLOCK_K, WHOLE)
            b = _tile(weight, first_column, step * BLOCK_K, N, K, BLOCK_N, BLOCK_K, WHOLE)
        if SWAPPED:
            a, b = b, a
        acc = tl.dot(a, b.T, acc, input_precision="ieee")
    if SWAPPED:
        acc = acc.T
    row = first_row + tl.arange(0, BLOCK_M)[:, None]
    column = first_column + tl.arange(0, BLOCK_N)[None, :]
    mask = (row < rows) & (column < N)
    if SPLITS == 1:
        _store(y, bias, acc, row, column, mask, N)
    else:
        offsets = row.to(tl.int64) * N + column
        size = rows.to(tl.int64) * N
        tl.store(partials + split * size + offsets, acc, mask)
        tl.debug_barrier()  # every thread has stored its part before one of them counts this split as done
        if tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1:
            # the last one adds all parts, its own too, in their order: the same bits whoever is last
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for part in tl.static_range(SPLITS):
                total += tl.load(partials + part * size + offsets, mask, other=0.0, cache_modifier=".cg")
            _store(y, bias, total, row, column, mask, N)
            tl.store(counters + tile, 0)


def new_counters(device: torch.device) -> Tensor:
    """int32[MAX_TILES] zeros for `gemm`, which leaves them zero."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: GemmConfig,
    *,
    counters: Tensor | None = None,
    tma: bool | None = None,
    pdl: bool = False,
) -> Tensor:
    """x [T, K] @ weight[N, K]^T + bias [N] -> [T, N] in x's dtype (bf16, fp16; fp32 where it need not be fast).

    K a multiple of 8. counters: `new_counters` of the device, needed for config.splits > 1 only, and shared by calls
    that follow each other on one stream; None: fresh ones, a memset a call. tma: None for what the device has.
    Bitwise repeatable. Raises ValueError for shapes that it cannot take.
    """
    rows, k = x.shape
    n = len(weight)
    if weight.shape[1] != k or k % 8:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must share K, a multiple of 8")
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    x, weight = x.contiguous(), weight.contiguous()
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(n, config.block_n)
    partials = None
    if config.splits > 1:
        partials = torch.empty(config.splits, rows, n, dtype=torch.float32, device=x.device)
        counters = new_counters(x.device) if counters is None else counters
        if tiles > len(counters):
            raise ValueError(f"{config} makes {tiles} tiles of {rows} x {n}; with splits there can be {len(counters)}")
    tma = _has_tma(x, weight) if tma is None else tma
    gemm_kernel[(tiles, config.splits)](
        TensorDescriptor(x, [rows, k], [k, 1], [config.block_m, config.block_k]) if tma else x,
        TensorDescriptor(weight, [n, k], [k, 1], [config.block_n, config.block_k]) if tma else weight,
        weight,
        bias,
        y,
        partials,
        counters if config.splits > 1 else None,
        rows,
        N=n,
        K=k,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLITS=config.splits,
        PREFETCH=config.prefetch if pdl else 0,
        SWAPPED=config.swapped,
        TMA=tma,
        PDL=pdl,
        num_warps=config.warps,
        num_stages=config.stages,
        launch_pdl=pdl,
    )
    return y


def _has_tma(x: Tensor, weight: Tensor) -> bool:
    """Whether the device has a tensor memory accelerator (Hopper on) and it takes these addresses."""
    if not x.is_cuda or x.data_ptr() % 16 or weight.data_ptr() % 16:
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0)
