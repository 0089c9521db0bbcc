"""Linears with several frozen adapters and a trained gate that weighs them anew for every token (MeteoRA, section 3.2).

Put into a model in place of its linears for training; the engine has its own form of the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters_store.linear_names import Module, module_path
from adapters_store.types import TARGETS, AdapterWeights, LoraPair
from routing.train.gate_tally import GateTally
from routing.train.side_by_side import SideBySide


@dataclass(frozen=True, slots=True)
class GateChoice:
    """How logits become weights: the `top_k` highest, by the softmax of these over `temperature`."""

    top_k: int
    temperature: float


def gate_weights(logits: Tensor, choice: GateChoice) -> Tensor:
    """Weights (..., rows) of logits (..., rows): they sum to 1, and all but `top_k` of them are 0.

    At temperature 1 this equals a softmax over all rows whose highest weights are kept and divided by their sum, as
    MeteoRA trains; so do the gradients. With one row chosen the weight is 1, and has no gradient.
    """
    chosen, index = logits.topk(choice.top_k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, index, (chosen / choice.temperature).softmax(-1))


class GatedLinear(torch.nn.Module):
    """base(x) + sum_i w_i s_i B_i A_i x, with w from x by the gate.

    `gate` (rows, in) has a row for each of the `experts`, and one for "no adapter" if there is one. With a `basis`
    (in, in) it is learned in that basis.
    """

    basis: Tensor | None

    def __init__(
        self,
        base: torch.nn.Linear,
        pairs: Mapping[int, LoraPair],
        rows: int,
        choice: GateChoice,
        tally: GateTally,
        *,
        trainable: bool = False,
        basis: Tensor | None = None,
    ) -> None:
        """pairs: by row of the gate, which starts at zero. trainable: they learn, too.

        For a fixed input the cross-entropy of a gate is convex: from zero, where all rows are alike, its gradient
        already tells them apart, and needs no random start. L_LM's first gradients do depend on how `topk` breaks the
        ties at zero: they reach only the rows that it takes.
        """
        super().__init__()
        self.base = base
        weight = base.weight
        self.gate = torch.nn.Parameter(torch.zeros(rows, base.in_features, device=weight.device))
        self.experts = SideBySide(pairs, rows, weight, trainable=trainable)
        self.choice = choice
        self.tally = tally
        self.register_buffer("basis", basis, persistent=False)

    @property
    def rows(self) -> Tensor:
        """The gate as it is served, (rows, in)."""
        if self.basis is None:
            return self.gate
        with torch.autocast(self.gate.device.type, enabled=False):  # what bf16 would round is scaled up by the basis
            return self.gate @ self.basis

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        y: Tensor = self.base(x)
        logits = torch.nn.functional.linear(x, self.rows).float()
        self.tally.add(logits)
        if not len(self.experts.a):
            return y
        delta: Tensor = self.experts(x, gate_weights(logits, self.choice))
        return y + delta


def embed_adapters(
    causal: torch.nn.Module,
    adapters: Sequence[AdapterWeights],
    null: bool,
    choice: GateChoice,
    tally: GateTally,
    *,
    trainable: bool = False,
    bases: Mapping[Module, Tensor] | None = None,
) -> dict[Module, GatedLinear]:
    """Freezes the model and replaces, in every layer, the targets that any adapter touches; by (layer, target).

    Row i of the gates is adapter i; with `null` one more row stands for no adapter. A layer in which no adapter touches
    such a target has a gate there all the same: a router's folder has the same gates in all layers. `trainable`: the
    adapters learn, too. `bases`: in which the gates learn, by (layer, target).
    """
    causal.requires_grad_(False)
    linears: dict[Module, GatedLinear] = {}
    for layer, target in gated_modules(causal, adapters):
        base = causal.get_submodule(module_path(layer, target))
        assert isinstance(base, torch.nn.Linear)
        pairs = {row: w.pairs[layer, target] for row, w in enumerate(adapters) if (layer, target) in w.pairs}
        basis = bases[layer, target] if bases else None
        linears[layer, target] = GatedLinear(
            base, pairs, len(adapters) + null, choice, tally, trainable=trainable, basis=basis
        )
        causal.set_submodule(module_path(layer, target), linears[layer, target])
    return linears


def gated_modules(causal: torch.nn.Module, adapters: Sequence[AdapterWeights]) -> list[Module]:
    """In every layer the targets that any adapter touches, as (layer, target)."""
    touched = {target for weights in adapters for _, target in weights.pairs}
    layers = range(causal.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    return [(layer, target) for layer in layers for target in TARGETS if target in touched]
