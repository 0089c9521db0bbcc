"""AdamW for several tasks at once: one row of a matrix is all weights of one task."""

from __future__ import annotations

import torch
from torch import Tensor


class GroupedAdamW:
    """The update of `torch.optim.AdamW` with a learning rate for each row (Loshchilov and Hutter 2019, algorithm 2)."""

    def __init__(
        self, values: Tensor, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-8
    ) -> None:
        self._values = values
        self._first = torch.zeros_like(values)
        self._second = torch.zeros_like(values)
        self._weight_decay = weight_decay
        self._betas = betas
        self._epsilon = epsilon
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: Tensor, rates: Tensor) -> None:
        """Moves each row by its own rate; `gradients` as the values (rows, width), `rates` (rows). Rate 0: it stays."""
        self._steps += 1
        slow, slower = self._betas
        rates = rates[:, None]
        self._first.lerp_(gradients, 1 - slow)
        self._second.mul_(slower).addcmul_(gradients, gradients, value=1 - slower)
        if self._weight_decay:
            self._values.mul_(1 - rates * self._weight_decay)
        root = self._second.sqrt().div_((1 - slower**self._steps) ** 0.5).add_(self._epsilon)
        self._values.sub_(self._first.div(root).mul_(rates / (1 - slow**self._steps)))


@torch.no_grad()
def clip_rows(gradients: Tensor, longest: float) -> None:
    """Scales each row down to the norm `longest`, as `torch.nn.utils.clip_grad_norm_` does with one task's weights."""
    norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
    gradients.mul_((longest / (norms + 1e-6)).clamp(max=1.0))
