"""The kernels of the gates against the formulas, row by row: under Triton's interpreter, or on the GPU."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.gate_rows import TOTALS, Gated, GateRows
from kernels.gates import gate_config, gate_scale
from tests.kernels.lora_pools import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

SLICES, GATES, INPUTS, GROUP, FIRST_TARGET = 3, 32, 72, 2, 4
COLUMNS = (5, -1, 0, 3, 7, 5)
ADAPTERS = ([5, 0, 3, 5, -2], [0, 7, -2, -2, 3])
"""Of the gates in both slots; adapter 5 is that of two gates of the first."""


def ints(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def words(allowed: list[list[int]]) -> Tensor:
    """Bits of up to 32 gates, as int32[T, 1]."""
    bits = [sum(1 << gate for gate in row) for row in allowed]
    return ints([[value - (1 << 32) if value >> 31 else value] for value in bits])


def step(rows: int, slots: list[int], top_k: list[int], allowed: list[list[int]], **changes: Tensor) -> GateRows:
    whole = GateRows(
        slots=ints(slots),
        top_k=ints(top_k),
        temperatures=torch.ones(rows, device=DEVICE),
        masks=words(allowed),
        touches=ints([1 << GROUP] * rows),
        shares=ints(list(range(rows))),
        targets=ints([0b1110000, 0b1010000]),
        counts=ints([GATES, 5]),
        adapters=ints([[*own, *[-2] * (GATES - len(own))] for own in ADAPTERS]),
        totals=torch.zeros(rows, TOTALS, GATES, device=DEVICE),
    )
    return replace(whole, **changes)


def formulas(x: Tensor, gates: Tensor, rows: GateRows) -> tuple[Tensor, Tensor]:
    """(scale [S, T, U], totals [T, 3, N]) in plain Python."""
    scale, totals = torch.ones(SLICES, len(x), len(COLUMNS)), torch.zeros(len(x), TOTALS, GATES)
    for row, slot in enumerate(rows.slots.tolist()):
        if slot < 0:
            continue
        for part in range(SLICES):
            logits = gates[slot, part].double() @ x[row].double()
            allowed = [gate for gate in range(GATES) if int(rows.masks[row, 0]) >> gate & 1]
            chosen = sorted(allowed, key=lambda gate: -logits[gate])[: int(rows.top_k[row])]
            has = int(rows.targets[slot]) >> (FIRST_TARGET + part) & 1
            weights = torch.zeros(GATES)
            if chosen and has:
                weights[chosen] = (logits[chosen] / rows.temperatures[row].double()).softmax(0).float()
            totals[row, part] += weights
            owners = rows.adapters[slot].tolist()
            for column, owner in enumerate(COLUMNS):
                scale[part, row, column] = sum(w for w, own in zip(weights, owners, strict=True) if own == owner)
    return scale, totals


def scaled(x: Tensor, gates: Tensor, rows: GateRows, columns: object = COLUMNS) -> Tensor:
    return gate_scale(x, Gated(gates, rows, ints(columns), GROUP, FIRST_TARGET))


def inputs(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x, and the gates of two slots within those of three layers; the others, and those behind the last, are NaN."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, INPUTS, generator=generator).to(DEVICE, dtype)
    layers = torch.full((2, 3, SLICES, GATES, INPUTS), float("nan"), dtype=dtype, device=DEVICE)
    layers[:, 1] = torch.randn(2, SLICES, GATES, INPUTS, generator=generator).to(DEVICE, dtype) * 0.4
    layers[1, :, :, 5:] = float("nan")
    return x, layers[:, 1]


def assert_equal(x: Tensor, gates: Tensor, rows: GateRows) -> None:
    found = scaled(x, gates, rows)
    scale, totals = formulas(x.cpu(), gates.cpu(), GateRows(**{k: v.cpu() for k, v in vars(rows).items()}))
    torch.testing.assert_close(found.cpu(), scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows.totals.cpu(), totals, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of 1 / 1e-38, in the interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_several_slots_and_of_none(dtype: torch.dtype) -> None:
    x, gates = inputs(19, dtype)
    slots = [(0, 1, -1)[row % 3] for row in range(18)] + [0]
    top_k = [1 + row % 4 for row in range(19)]
    allowed = [[gate for gate in range(5) if (row + gate) % 4] for row in range(18)] + [[0, 31]]
    rows = step(19, slots, top_k, allowed)
    rows.temperatures[:] = torch.tensor([0.3, 1.0, 20.0, 1e-38]).repeat(5)[:19]
    assert_equal(x, gates, rows)


def test_more_rows_than_a_block_holds() -> None:
    x, gates = inputs(130)
    slots = [0] * 70 + [-1] * 50 + [1] * 10
    assert_equal(x, gates, step(130, slots, [2] * 130, [[0, 1, 2, 4]] * 130))


def test_ties_go_to_the_first_and_no_permission_is_no_weight() -> None:
    x, gates = inputs(3)
    gates[:, :, :5] = 1.0
    rows = step(3, [0, 0, 1], [2, 2, 2], [[1, 2, 3], [], [1, 4]])
    scale = scaled(x, gates, rows, [0, 3, 5, 7]).cpu()
    assert scale[0].tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0, 0], [0, 0.5, 0, 0.5]]
    told = rows.totals.sum(dim=1)[:, :5].tolist()
    assert told == [[0, 1.5, 1.5, 0, 0], [0] * 5, [0, 1, 0, 0, 1]]  # slot 1 has gates for two linears of three


def test_only_rows_that_touch_the_group_and_yield_a_token_are_counted() -> None:
    x, gates = inputs(4)
    rows = step(
        4, [0] * 4, [1] * 4, [[0, 1]] * 4, touches=ints([0, -1, 1 << GROUP, 0b1011]), shares=ints([0, -1, 1, 1])
    )
    rows.totals[0] = 7.0
    scaled(x, gates, rows)
    assert (rows.totals[0] == 7.0).all()
    assert rows.totals[1].sum() == SLICES
    assert (rows.totals[2:] == 0).all()


def test_sums_go_on_from_call_to_call_and_repeat_bit_by_bit() -> None:
    x, gates = inputs(5)
    found = []
    for _ in range(2):
        rows = step(5, [0, 1, 0, 1, -1], [2] * 5, [[0, 1, 2]] * 5)
        scales = [scaled(x, gates, rows) for _ in range(2)]
        found.append((*scales, rows.totals))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert rows.totals.sum(dim=(1, 2)).tolist() == pytest.approx([6, 4, 6, 4, 0])


def test_more_than_32_gates() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, generator=generator).to(DEVICE)
    gates = torch.randn(1, 1, 64, 16, generator=generator).to(DEVICE)
    rows = GateRows(
        slots=ints([0, 0]),
        top_k=ints([64, 3]),
        temperatures=torch.ones(2, device=DEVICE),
        masks=ints([[-1, -1], [0, -1]]),
        touches=ints([1, 1]),
        shares=ints([0, 1]),
        targets=ints([1]),
        counts=ints([64]),
        adapters=ints([list(range(64))]),
        totals=torch.zeros(2, TOTALS, 64, device=DEVICE),
    )
    scale = gate_scale(x, Gated(gates, rows, ints(list(range(64))), 0, 0))[0]
    logits = (x @ gates[0, 0].T).double()
    torch.testing.assert_close(scale[0], logits[0].softmax(0).float(), rtol=1e-4, atol=1e-6)
    assert scale[1].nonzero().flatten().tolist() == sorted((32 + logits[1, 32:].topk(3).indices).tolist())


def test_wrong_shapes_are_refused() -> None:
    x, gates = inputs(2)
    rows = step(2, [0, 0], [1, 1], [[0], [0]])
    for wrong in ((x[:, :-1], gates, rows), (x[:1], gates, rows), (x, gates[:, :, :16], rows), (x, gates[:1], rows)):
        with pytest.raises(ValueError, match=r"expected|rows are for"):
            scaled(*wrong)
    nobody = replace(rows, slots=ints([]))
    assert scaled(x[:0], gates, nobody).shape == (SLICES, 0, len(COLUMNS))
    with pytest.raises(ValueError, match=r"factors are \(3, 1, 6\)"):
        gate_scale(x, Gated(gates, rows, ints(COLUMNS), 0, 0, torch.ones(3, 1, 6, device=DEVICE)))
    with pytest.raises(ValueError, match="totals are"):
        scaled(x, gates, replace(rows, totals=rows.totals[:, 0]))


def test_factors_multiply_the_weights() -> None:
    x, gates = inputs(3)
    rows = step(3, [0, -1, 1], [2] * 3, [[0, 1, 2, 3]] * 3)
    plain = scaled(x, gates, rows)
    factors = torch.rand(SLICES, 3, len(COLUMNS), device=DEVICE)
    found = gate_scale(x, Gated(gates, rows, ints(COLUMNS), GROUP, FIRST_TARGET, factors))
    torch.testing.assert_close(found, plain * factors)


@pytest.mark.parametrize(("rows", "inputs", "splits"), [(1, 4096, 16), (64, 4096, 16), (64, 576, 2), (4096, 4096, 1)])
def test_splits_fill_the_gpu_but_are_not_too_short(rows: int, inputs: int, splits: int) -> None:
    assert gate_config(rows, inputs, 3, 2).splits == splits
