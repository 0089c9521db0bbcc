"""Which rows of a step are weighed by gates: what the kernels of `kernels.gates` read."""

from dataclasses import dataclass

from torch import Tensor

MASK_BITS = 32
"""Gates whose permissions are one word; the gates of a slot are a multiple of it."""


@dataclass(frozen=True, eq=False)
class GateRows:
    """Which rows of a step are weighed by which gates and how: arrays on the device, int32 unless said otherwise.

    T rows; S slots for gates, N gates in each. slots [T]: the slot of each row's gates, -1 for rows without. top_k [T].
    temperatures fp32[T], above 0. masks [T, N / 32]: bit j of word i: whether gate 32 i + j may be chosen.
    touches [T]: bit g: whether any adapter of the row acts in target group g. shares [T]: the row of `totals` to which
    the row's weights are added, or -1. targets [S]: bit t: whether the slot has gates for target t. counts [S]: the
    gates in each slot. adapters [S, N]: the adapter of each gate, by numbers of the step from 0 on; below -1
    for none.
    totals fp32[any, N]: 0 before the step, then the sum of the weights over all linears in groups that the row touches.
    """

    slots: Tensor
    top_k: Tensor
    temperatures: Tensor
    masks: Tensor
    touches: Tensor
    shares: Tensor
    targets: Tensor
    counts: Tensor
    adapters: Tensor
    totals: Tensor
