"""Which rows of a step are weighed by gates: what the kernels of `kernels.gates` read."""

from dataclasses import dataclass

from torch import Tensor

MASK_BITS = 32
"""Gates whose permissions are one word; the gates of a slot are a multiple of it."""

TOTALS = 3
"""Linears that share an input, at most: the weights of each are summed apart, so that no two programs meet."""


@dataclass(frozen=True, eq=False)
class GateRows:
    """Which rows of a step are weighed by which gates and how: arrays on the device, int32 unless said otherwise.

    T rows; S slots for gates, N gates in each. slots [T]: the slot of each row's gates, -1 for rows without. top_k [T].
    temperatures fp32[T], above 0. masks [T, N / 32]: bit j of word i: whether gate 32 i + j may be chosen.
    touches [T]: bit g: whether any adapter of the row acts in target group g. shares [T]: the row of `totals` to which
    the row's weights are added, or -1. targets [S]: bit t: whether the slot has gates for target t. counts [S]: the
    gates in each slot. adapters [S, N]: the adapter of each gate, by numbers of the step from 0 on; below -1
    for none.
    totals fp32[any, 3, N]: 0 before the step, then the sums of the weights over all linears in groups that the row
    touches, apart for the first, second and third linear of the groups.
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


@dataclass(frozen=True, eq=False)
class Gated:
    """How gates weigh the columns of the mapping of one group of linears in one layer.

    gates [slots, S, N, in] in the dtype of the inputs, every slot contiguous. columns int32[U]: the adapter that owns
    each column, in the numbers of `GateRows.adapters`, -1 for none. group, first_target: the numbers of the group and
    of its first linear, which count the bits of `touches` and `targets`. factors: None or fp32[S, T, U], by which the
    weights are multiplied besides.
    """

    gates: Tensor
    rows: GateRows
    columns: Tensor
    group: int
    first_target: int
    factors: Tensor | None = None


def check_gates(x: Tensor, gated: Gated) -> None:
    """Raise ValueError where shapes do not fit those of the inputs x [T, in]."""
    slots, _, num_gates, inputs = gated.gates.shape
    rows = gated.rows
    if x.dim() != 2 or x.shape[1] != inputs or x.stride(1) != 1:
        raise ValueError(f"x is {tuple(x.shape)}, expected [T, {inputs}] with contiguous rows")
    contiguous = gated.gates.stride()[1:] == (num_gates * inputs, inputs, 1)
    if num_gates % MASK_BITS or num_gates & (num_gates - 1) or not contiguous:
        raise ValueError(f"gates are {tuple(gated.gates.shape)}, expected contiguous slots of 32, 64, 128 ... gates")
    if rows.slots.shape != (len(x),) or rows.adapters.shape != (slots, num_gates):
        raise ValueError(f"rows are for {len(rows.slots)} rows and {tuple(rows.adapters.shape)} gates")
    factors = gated.factors
    if factors is not None and (factors.shape[1:] != (len(x), len(gated.columns)) or factors.stride(2) != 1):
        raise ValueError(f"factors are {tuple(factors.shape)}, expected [S, {len(x)}, {len(gated.columns)}]")
    if rows.totals.shape[1:] != (TOTALS, num_gates):
        raise ValueError(f"totals are {tuple(rows.totals.shape)}, expected [any, {TOTALS}, {num_gates}]")
