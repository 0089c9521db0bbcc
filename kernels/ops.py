"""The operations that a backend provides, and the choice of the backend."""

from collections.abc import Mapping as ReadOnlyDict
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from kernels import reference
from kernels.attention import AttentionMeta
from kernels.mapping import Mapping


class Ops(Protocol):
    """One backend. T token rows; D head size; all tensors on one device, in the model's dtype unless said otherwise."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight over the last dimension, in fp32. `weight` broadcasts against x."""
        ...

    def rms_norm_residual(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual)."""
        ...

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of x [T, heads, D] (halves convention); cos, sin [T, D], the first half of sin negated."""
        ...

    def silu_mul(self, x: Tensor) -> Tensor:
        """silu(gate) * up for x [T, 2 * n] = (gate, up) -> [T, n]."""
        ...

    def pack_linear(self, weight: Tensor) -> Tensor:
        """`weight` [out, in] in the layout that `linear` runs fastest with; the same tensor where that is it."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] @ weight[out, in]^T + bias -> [T, out]; `weight` from `pack_linear`."""
        ...

    def lora_(
        self,
        y: Tensor,
        x: Tensor,
        a_pages: Tensor,
        b_pages: Tensor,
        mapping: Mapping,
        slices: tuple[int, ...],
        scale: Tensor | None = None,
    ) -> Tensor:
        """y [T, sum(slices)] += the low-rank updates of the rows' pages, in place.

        a_pages [P, S * 16, in]: rows s*16..s*16+15 belong to output slice s; b_pages [P, 16, sum(slices)].
        scale: None or fp32[S, T, len(mapping.pages)], a further factor for every slice, row and page.
        A row never sees a page whose weight is 0 for it, whatever the page holds.
        """
        ...

    def store_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta) -> None:
        """Write k, v [T, kv heads, D] into the caches [blocks, block_size, kv heads, D] at `meta.slots`."""
        ...

    def paged_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float, window: int | None
    ) -> Tensor:
        """Causal attention of q [T, heads, D] over the last `window` tokens of its sequence -> [T, heads, D]."""
        ...


BACKENDS: ReadOnlyDict[str, Ops] = MappingProxyType({"reference": reference})
DEFAULTS: ReadOnlyDict[str, str] = MappingProxyType({"cpu": "reference", "cuda": "reference"})


def select_ops(device: torch.device, override: str | None = None) -> Ops:
    """The backend for `device`, or the one that `override` names: "reference". Raises ValueError for an unknown one."""
    name = override or DEFAULTS.get(device.type, "")
    if name not in BACKENDS:
        raise ValueError(f"No backend {override!r} for {device.type}; there are {', '.join(BACKENDS)}")
    return BACKENDS[name]
