"""Norms and activation in Triton: one program a row, each value read and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.summands import Summands

NORM_ELEMENTS = 16
"""Elements a thread of the norms: two loads of 16 bytes of every operand in flight."""

SILU_BLOCK = 1024
"""Columns a program of `silu_mul`: 14 programs a row at a width of 14336, enough for one row to use the whole GPU."""


@triton.jit
def rms_norm_kernel(
    x,
    delta,
    residual,
    weight,
    out,
    new_residual,
    eps,
    N: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row of N values; delta, and residual with new_residual, may be None."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    # constant while the model serves, hence before the wait
    factors = tl.load(weight + (row % WEIGHT_ROWS) * N + columns, mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    offsets = row.to(tl.int64) * N + columns
    values = tl.load(x + offsets, mask, other=0.0).to(tl.float32)
    if delta is not None:
        values += tl.load(delta + offsets, mask, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + offsets, mask, other=0.0).to(tl.float32)
        rounded = values.to(new_residual.dtype.element_ty)
        tl.store(new_residual + offsets, rounded, mask)
        values = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=0) / N + eps)
    normed = (values * inverse).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + offsets, (normed * factors).to(out.dtype.element_ty), mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, pdl: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, rounded as `kernels.reference.rms_norm` does.

    x [..., N]; `weight` has the shape of x's last dimensions, one or more. Raises ValueError where it has not.
    """
    if weight.shape != x.shape[x.dim() - weight.dim() :]:
        raise ValueError(f"weight {tuple(weight.shape)} must match the last dimensions of x {tuple(x.shape)}")
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch_rms_norm(x, None, None, weight, out, None, eps, pdl)
    return out


def rms_norm_residual(
    x: Summands, residual: Tensor, weight: Tensor, eps: float, *, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """(rms_norm(s), s) of s = x + residual, all [T, N], weight [N].

    s is summed in fp32 and rounded once to the dtype; the norm's statistics are those of the rounded values.
    """
    y, delta = x
    residual = residual.contiguous()
    out, new_residual = torch.empty_like(residual), torch.empty_like(residual)
    delta = None if delta is None else delta.contiguous()
    _launch_rms_norm(y.contiguous(), delta, residual, weight, out, new_residual, eps, pdl)
    return out, new_residual


def _launch_rms_norm(
    x: Tensor,
    delta: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    out: Tensor,
    new_residual: Tensor | None,
    eps: float,
    pdl: bool,
) -> None:
    n = x.shape[-1]
    if x.numel() == 0:
        return
    block = triton.next_power_of_2(n)
    rms_norm_kernel[(x.numel() // n,)](
        x,
        delta,
        residual,
        weight.contiguous(),
        out,
        new_residual,
        eps,
        N=n,
        WEIGHT_ROWS=weight.numel() // n,
        BLOCK=block,
        PDL=pdl,
        num_warps=norm_warps(block),
        launch_pdl=pdl,
    )


def norm_warps(block: int) -> int:
    """Warps of a norm over `block` columns, a power of two."""
    return max(1, min(16, block // (32 * NORM_ELEMENTS)))


@triton.jit
def silu_mul_kernel(x, delta, out, N: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Columns [BLOCK * j, BLOCK * (j + 1)) of row i, program (j, i)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    offsets = row * (2 * N) + columns
    gate = tl.load(x + offsets, mask, other=0.0).to(tl.float32)
    up = tl.load(x + offsets + N, mask, other=0.0).to(tl.float32)
    if delta is not None:
        gate += tl.load(delta + offsets, mask, other=0.0).to(tl.float32)
        up += tl.load(delta + offsets + N, mask, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * N + columns, (activated * up).to(out.dtype.element_ty), mask)


def silu_mul(x: Summands, *, pdl: bool = False) -> Tensor:
    """silu(gate) * up for x [T, 2 * n] = (gate, up) -> [T, n]; silu(gate) is rounded to the dtype first."""
    y, delta = x
    n = y.shape[1] // 2
    out = torch.empty(len(y), n, dtype=y.dtype, device=y.device)
    if len(y) == 0:
        return out
    block = min(SILU_BLOCK, triton.next_power_of_2(n))
    delta = None if delta is None else delta.contiguous()
    # rows are the second axis, whose limit is 65535; a step has no more
    silu_mul_kernel[(triton.cdiv(n, block), len(y))](
        y.contiguous(), delta, out, N=n, BLOCK=block, PDL=pdl, num_warps=4, launch_pdl=pdl
    )
    return out
