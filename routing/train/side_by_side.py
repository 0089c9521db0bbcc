"""The LoRA factors of several adapters on one linear, side by side, under weights that are decided elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adapters_store.types import LoraPair


class SideBySide(torch.nn.Module):
    """sum_i w_i s_i B_i A_i x.

    `a` (columns, in) and `b` (out, columns) hold the factors of all experts one after the other, so that ranks may
    differ; `owners` (experts, columns) has an expert's scale s_i at its columns. An expert without columns, one that
    does not act here or "no adapter", takes its weight and adds nothing.
    """

    owners: Tensor

    def __init__(self, pairs: Mapping[int, LoraPair], experts: int, weight: Tensor, *, trainable: bool = False) -> None:
        """pairs: by expert. weight: the linear's, (out, in); all is on its device, in fp32."""
        super().__init__()
        a = _joined([pair.a for pair in pairs.values()], 0, weight)
        b = _joined([pair.b for pair in pairs.values()], 1, weight)
        self.a = torch.nn.Parameter(a, requires_grad=trainable)
        self.b = torch.nn.Parameter(b, requires_grad=trainable)
        owners = torch.zeros(experts, len(a))
        self._columns: dict[int, slice] = {}
        self._scales = {expert: pair.scale for expert, pair in pairs.items()}
        column = 0
        for expert, pair in pairs.items():
            self._columns[expert] = slice(column, column + pair.rank)
            owners[expert, self._columns[expert]] = pair.scale
            column += pair.rank
        self.register_buffer("owners", owners.to(weight.device), persistent=False)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x (..., in) and weights (..., experts) fp32, of equal or broadcast leading sizes, to (..., out)."""
        inner = torch.nn.functional.linear(x, self.a) * (weights @ self.owners)
        return torch.nn.functional.linear(inner, self.b)

    def pairs(self, dtype: torch.dtype) -> dict[int, LoraPair]:
        """The factors as they are now, by expert, on the CPU."""
        a, b = self.a.detach().to("cpu", dtype), self.b.detach().to("cpu", dtype)
        return {
            expert: LoraPair(a[columns].contiguous(), b[:, columns].contiguous(), self._scales[expert])
            for expert, columns in self._columns.items()
        }


def _joined(factors: Sequence[Tensor], dim: int, weight: Tensor) -> Tensor:
    """fp32, on the device of the base's `weight` (out, in)."""
    if not factors:
        return torch.zeros((0, weight.shape[1]) if dim == 0 else (weight.shape[0], 0), device=weight.device)
    return torch.cat([factor.float() for factor in factors], dim=dim).to(weight.device)
