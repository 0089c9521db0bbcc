"""A row for an adapter that joins trained gates: where the others lie, its logits shall lie as theirs do.

With the logits l_i(x) = g_i x of the trained rows, the new row g is the least-squares solution of

    g x = max_i l_i(x) + lead     for tokens x of the new adapter's samples,
    g x = l_own(x) - above        for tokens of the others' samples, own being the row of their adapter,

in which `lead` is by how much a trained row is above the best other one at its own tokens, `above` by how much it is
above the mean of the others; both sides weigh the same, and the squared norm of g weighs `ridge` times the mean square
of an input. Gates have no bias: what a constant would do is done through the inputs' mean, as far as they have one.

It is a prototype row whose distance takes all correlations of the inputs into account. Measured with SmolLM2-135M and
the demo's adapters, 10 samples each, gates of three layers fitted without one of three adapters, validation rows, each
under its own adapter: of all tokens of the new adapter's task 98.2% have its logit highest with ridge 0.1, and 97.8%
with gates that are fitted to all adapters. With the difference of the means of both sides, scaled and shifted to the
same mean logits, it is 87.2%, with this difference over the variances 91.4%. Of the others' tokens 98.4% stay where
they belong, as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 0.1


@dataclass
class _Side:
    """Sums over one side's tokens x: of x x^T (in, in), of x (in), of x by its targets (linears, in); their number."""

    second: Tensor
    first: Tensor
    cross: Tensor
    count: int = 0

    @classmethod
    def of(cls, linears: int, width: int, device: torch.device) -> _Side:
        return cls(
            torch.zeros(width, width, device=device),
            torch.zeros(width, device=device),
            torch.zeros(linears, width, device=device),
        )

    def add(self, x: Tensor, targets: Tensor) -> None:
        self.second += x.T @ x
        self.first += x.sum(dim=0)
        self.cross += targets.T @ x
        self.count += len(x)


class RowFit:
    """Fits the new rows of the gates of linears that share an input. Sums only: no token is kept."""

    def __init__(self, gates: Tensor) -> None:
        """gates: (linears, rows, in) fp32, of at least two rows."""
        if gates.shape[1] < 2:
            raise ValueError(f"gates of {gates.shape[1]} rows: expected at least two, whose distance can be measured")
        linears, _, width = gates.shape
        self._gates = gates
        self._new, self._old = (_Side.of(linears, width, gates.device) for _ in range(2))
        self._lead = torch.zeros(linears, device=gates.device)
        self._above = torch.zeros(linears, device=gates.device)

    def add(self, x: Tensor, label: int | None) -> None:
        """Tokens x (tokens, in) fp32 of the samples of row `label`, of the new adapter if None."""
        logits = torch.einsum("ti,lri->tlr", x, self._gates)
        if label is None:
            self._new.add(x, logits.amax(dim=2))
            return
        own = logits[:, :, label]
        others = torch.cat([logits[:, :, :label], logits[:, :, label + 1 :]], dim=2)
        self._old.add(x, own)
        self._lead += (own - others.amax(dim=2)).sum(dim=0)
        self._above += (own - others.mean(dim=2)).sum(dim=0)

    def rows(self, ridge: float = RIDGE) -> Tensor:
        """(linears, in). Raises ValueError unless tokens of both sides were added."""
        new, old = self._new, self._old
        if not new.count or not old.count:
            raise ValueError(f"{new.count} tokens of the new adapter, {old.count} of others: expected some of both")
        lead, above = self._lead / old.count, self._above / old.count
        second = new.second / new.count + old.second / old.count
        cross = (new.cross + torch.outer(lead, new.first)) / new.count
        cross += (old.cross - torch.outer(above, old.first)) / old.count
        second.diagonal().add_(ridge * second.diagonal().mean())
        found: Tensor = torch.linalg.solve(second.double(), cross.double().T).T.float()
        return found


def hits(gates: Sequence[Tensor], x: Tensor, label: int) -> Tensor:
    """For each token x (tokens, in) the share of the gates (rows, in) whose highest logit is row `label`."""
    return torch.stack([(x @ gate.T).argmax(dim=1) == label for gate in gates]).float().mean(dim=0)
