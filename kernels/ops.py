"""The operations that a backend provides, and the choice of the backend."""

from collections.abc import Mapping as ReadOnlyDict
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from kernels import reference
from kernels.gate_rows import Gated
from kernels.summands import Summands

Attention: TypeAlias = Any
"""A step's attention layout, each backend's own: `kernels.gather.AttentionMeta` or `kernels.attention.PagedMeta`."""

Mapping: TypeAlias = Any
"""A step's mapping matrix of one target group, each backend's own: `kernels.mapping.Mapping`, or
`kernels.tiles.LoraTiles` and `kernels.gated_pages.GatedPages`."""


class Ops(Protocol):
    """One backend. T token rows; D head size; all tensors on one device, in the model's dtype unless said otherwise.

    captures: all that changes between steps is read from device memory, so that a step can be captured as a graph.
    """

    captures: bool

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight over the last dimension, in fp32. `weight` broadcasts against x."""
        ...

    def rms_norm_residual(self, x: Summands, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(sum), sum) of sum = x + residual."""
        ...

    def silu_mul(self, x: Summands) -> Tensor:
        """silu(gate) * up for x [T, 2 * n] = (gate, up) -> [T, n]."""
        ...

    def rotary_store(
        self,
        qkv: Summands,
        qk_norm: Tensor | None,
        eps: float,
        rotary: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        meta: Attention,
    ) -> Tensor:
        """Queries [T, heads, D] of qkv [T, (heads + 2 * kv heads) * D]; keys and values go to the cache.

        qk_norm: None, or the weights [heads + kv heads, D] of an RMS norm of every query and key head.
        rotary: cos, sin [T, D] in the halves convention, the first half of sin negated; queries and keys are rotated.
        cache: keys, values [blocks, block_size, kv heads, D].
        """
        ...

    def pack_linear(self, weight: Tensor) -> Tensor:
        """`weight` [out, in] in the layout that `linear` runs fastest with; the same tensor where that is it."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] @ weight[out, in]^T + bias -> [T, out]; `weight` from `pack_linear`."""
        ...

    def lora_linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pages: tuple[Tensor, Tensor],
        mapping: Mapping,
        slices: tuple[int, ...],
        scale: Tensor | Gated | None = None,
    ) -> Summands:
        """`linear` plus the low-rank updates of the rows' pages, [T, sum(slices)].

        pages: A [P, S * 16, in], whose rows s*16..s*16+15 belong to output slice s, and B [P, 16, sum(slices)].
        scale: None or fp32[S, T, columns], a further factor for every slice, row and page of the mapping; or the gates
        that say it, for a backend that `captures` and a mapping that it has for them.
        A row never sees a page whose weight is 0 for it; a backend states what pages must hold for that.
        """
        ...

    def paged_attention(
        self, q: Tensor, cache: tuple[Tensor, Tensor], meta: Attention, scale: float, window: int | None
    ) -> Tensor:
        """Causal attention of q [T, heads, D] over the last `window` tokens of its sequence -> [T, heads, D]."""
        ...

    def greedy(self, logits: Tensor, masks: Tensor | None = None) -> Tensor:
        """int64[R]: the first of the most likely tokens of every row of logits [R, V].

        masks: None, or int32[R, at least V / 32]; only tokens t count with bit t % 32 of word t // 32 set.
        -1 where the highest logit that counts is not finite, NaN counting as higher than all others.
        """
        ...


BACKENDS = ("reference", "triton")
DEFAULTS: ReadOnlyDict[str, str] = MappingProxyType({"cpu": "reference", "cuda": "triton"})


def select_ops(device: torch.device, override: str | None = None) -> Ops:
    """The backend for `device`, or the one that `override` names: "reference" or "triton".

    A backend is imported when it is selected, so that a CPU never loads Triton. Raises ValueError for an unknown one.
    """
    name = override or DEFAULTS.get(device.type, "")
    if name not in BACKENDS:
        raise ValueError(f"No backend {override!r} for {device.type}; there are {', '.join(BACKENDS)}")
    if name == "reference":
        return reference
    from kernels.triton_ops import TritonOps

    return TritonOps(device)
