"""What a forward pass says of all gates, summed up gate by gate: their loss, and how often they are right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from routing.train.batches import IGNORED


class GateTally:
    """Every gate adds its logits as it is passed: at no time do those of all layers stand side by side.

    Outside of `counting` nothing is counted; what was counted last stays to be read.
    """

    def __init__(self) -> None:
        self._smoothing = 0.0
        self._places: Tensor | None = None
        self._labels = torch.empty(0, dtype=torch.int64)
        self._losses: Tensor | None = None
        self._hits: Tensor | None = None
        self._gates = 0

    @contextlib.contextmanager
    def counting(self, labels: Tensor, *, smoothing: float = 0.0, hits: bool = False) -> Iterator[None]:
        """Around one forward pass, of tokens whose gates should choose row `labels` (rows, longest) int64.

        Positions labelled -100 are not counted.

        Args:
            smoothing: share of every label that is spread over all rows of the gate.
            hits: count where a gate is right, too.

        Raises:
            ValueError: all positions are labelled -100.
        """
        flat = labels.flatten()
        places = (flat != IGNORED).nonzero().squeeze(1)
        if not len(places):
            raise ValueError(f"labels: expected a position that counts, all {len(flat)} are {IGNORED}")
        self._smoothing = smoothing
        self._places = places
        self._labels = flat[places]
        self._losses = None
        self._hits = torch.zeros(len(places), device=labels.device) if hits else None
        self._gates = 0
        try:
            yield
        finally:
            self._places = None

    def add(self, logits: Tensor) -> None:
        """One gate's logits (rows, longest, gate rows) fp32."""
        if self._places is None:
            return
        counted = logits.flatten(0, -2).index_select(0, self._places)
        loss = torch.nn.functional.cross_entropy(counted, self._labels, label_smoothing=self._smoothing)
        self._losses = loss if self._losses is None else self._losses + loss
        if self._hits is not None:
            self._hits += counted.argmax(dim=-1) == self._labels
        self._gates += 1

    @property
    def loss(self) -> Tensor:
        """Mean cross-entropy over all gates and counted positions, fp32 scalar: MeteoRA's L_gate."""
        assert self._losses is not None, "no gate was passed while counting"
        return self._losses / self._gates

    @property
    def hits(self) -> Tensor:
        """For every counted position, in reading order, the share of gates whose highest logit is the label; fp32."""
        assert self._hits is not None, "hits were not asked for"
        return self._hits / self._gates
