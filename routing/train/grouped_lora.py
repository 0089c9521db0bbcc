"""The LoRA factors of several tasks in one model: every row of a batch passes the factors of its own task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RANK_MULTIPLE = 8
"""Ranks are padded with zeros, which no step moves: tensor cores load rows of a multiple of 16 bytes."""


@dataclass(frozen=True, slots=True)
class LoraStart:
    """One adapted linear as `peft` initialised it: `a` (rank, in) and `b` (out, rank), and its name in the model."""

    name: str
    base: torch.nn.Module
    a: Tensor
    b: Tensor
    scale: float


class GroupedLinear(torch.nn.Module):
    """base(x) + scale * (x A^T) B^T with A and B of each row's task.

    `a` is (tasks, rank, in), `b` (tasks, out, rank). Rows of the input are ordered by task, equally many each, and
    belong to the first `tasks` of them; with 0 tasks the base answers alone.
    """

    def __init__(self, base: torch.nn.Module, a: torch.nn.Parameter, b: torch.nn.Parameter, scale: float) -> None:
        super().__init__()
        self.base = base
        self.a = a
        self.b = b
        self.scale = scale
        self.tasks = 0

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, ..., in) to (rows, ..., out)."""
        if not self.tasks:
            return self.base(x)  # type: ignore[no-any-return]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, for both products
        y: Tensor = self.base(x)
        a, b = self.a[: self.tasks], self.b[: self.tasks]
        inner = torch.bmm(x.reshape(self.tasks, -1, x.shape[-1]), a.transpose(1, 2))
        by_task = y.reshape(self.tasks, -1, y.shape[-1])
        return torch.baddbmm(by_task, inner, b.transpose(1, 2), alpha=self.scale).view(y.shape)


class GroupedLora:
    """The factors of `count` tasks, put into the model in place of its adapted linears.

    All factors of a task lie side by side in one row of `values` (count, width) fp32, of which `weights` are views:
    norms, clipping and the optimiser's step are a few operations over all tasks.
    """

    def __init__(self, causal: torch.nn.Module, starts: Sequence[LoraStart], count: int) -> None:
        sizes = [size for start in starts for size in (_padded(start.a, 0).numel(), _padded(start.b, 1).numel())]
        device = starts[0].a.device
        self.values = torch.empty(count, sum(sizes), device=device)
        self.weights: list[torch.nn.Parameter] = []
        self._ranks = [start.a.shape[0] for start in starts]
        self._linears: dict[str, GroupedLinear] = {}
        columns = iter(self.values.split(sizes, 1))
        for start in starts:
            a = _parameter(_padded(start.a, 0), next(columns))
            b = _parameter(_padded(start.b, 1), next(columns))
            self.weights += [a, b]
            self._linears[start.name] = GroupedLinear(start.base, a, b, start.scale)
            causal.set_submodule(start.name, self._linears[start.name])

    def use(self, tasks: int) -> None:
        """Batches from now on hold rows of the first `tasks` tasks; 0: of the base alone."""
        for linear in self._linears.values():
            linear.tasks = tasks

    def joined(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients of `weights` in the layout of `values`."""
        return torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)

    @torch.no_grad()
    def round_to_bf16(self) -> None:
        """Makes the factors what will be stored."""
        self.values.copy_(self.values.bfloat16())

    def state(self, task: int) -> dict[str, Tensor]:
        """One task's factors under the keys of `peft`'s files."""
        found = {}
        for rank, (name, linear) in zip(self._ranks, self._linears.items(), strict=True):
            found[f"base_model.model.{name}.lora_A.weight"] = linear.a[task, :rank].detach()
            found[f"base_model.model.{name}.lora_B.weight"] = linear.b[task, :, :rank].detach()
        return found


def lora_starts(model: Any) -> tuple[LoraStart, ...]:
    """The adapted linears of a `peft` model, with copies of their fresh factors."""
    from peft.tuners.lora import Linear

    return tuple(
        LoraStart(
            name,
            module.get_base_layer(),
            module.lora_A["default"].weight.detach().clone(),
            module.lora_B["default"].weight.detach().clone(),
            module.scaling["default"],
        )
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, Linear)
    )


def _padded(factor: Tensor, rank_dim: int) -> Tensor:
    missing = -factor.shape[rank_dim] % RANK_MULTIPLE
    return torch.nn.functional.pad(factor, (0, 0, 0, missing) if rank_dim == 0 else (0, missing))


def _parameter(start: Tensor, columns: Tensor) -> torch.nn.Parameter:
    """A parameter (count, *start.shape) that is a view of `columns` (count, start.numel())."""
    parameter = torch.nn.Parameter(columns.view(-1, *start.shape))
    with torch.no_grad():
        parameter.copy_(start)
    return parameter
