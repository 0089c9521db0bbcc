"""The kernels of `kernels.gates`, in Triton's language: logits of the gates, and the weights that follow from them."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def gate_logits_kernel(
    x: tl.tensor,
    gates: tl.tensor,
    partials: tl.tensor,
    row_slots: tl.tensor,
    slot_counts: tl.tensor,
    num_rows: tl.tensor,
    INPUTS: tl.constexpr,
    X_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    SLICES: tl.constexpr,
    GATES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """partials[split, row, slice] = x G^T over a split of the input, [GATES] in fp32, by the gates of the row's slot.

    Grid: (blocks of rows, slots * SLICES, SPLITS). A block with rows of several slots is multiplied with each of them.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.program_id(1) // SLICES
    part = tl.program_id(1) % SLICES
    own = tl.load(row_slots + rows, mask=rows < num_rows, other=-1) == slot
    if tl.max(own.to(tl.int32), axis=0) == 0:
        return
    STEPS: tl.constexpr = (INPUTS + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    k = tl.program_id(2) * (STEPS * BLOCK_K) + tl.arange(0, BLOCK_K)
    gate = tl.arange(0, GATES)
    x_at = x + rows.to(tl.int64) * X_STRIDE
    used = (gate < tl.load(slot_counts + slot))[:, None]
    gates_at = gates + slot.to(tl.int64) * SLOT_STRIDE + (part * GATES + gate) * INPUTS
    total = tl.zeros([ROWS, GATES], tl.float32)
    for step in range(STEPS):
        at = k + step * BLOCK_K
        inside = (at < INPUTS)[None, :]
        values = tl.load(x_at[:, None] + at[None, :], mask=own[:, None] & inside, other=0.0)
        weights = tl.load(gates_at[:, None] + at[None, :], mask=used & inside, other=0.0)
        total = tl.dot(values, tl.trans(weights), total, input_precision="ieee")
    out = ((tl.program_id(2) * num_rows + rows).to(tl.int64) * SLICES + part) * GATES
    tl.store(partials + out[:, None] + gate[None, :], total, mask=own[:, None])


@triton.jit
def chosen_weights(
    logits: tl.tensor, allowed: tl.tensor, top_k: tl.tensor, temperature: tl.tensor, GATES: tl.constexpr
) -> tl.tensor:
    """[GATES]: the softmax over the temperature of the `top_k` highest allowed logits, 0 for all others.

    Of equal logits the first ones are chosen. Where none is allowed all weights are 0. No row of all pairs of logits is
    held at once: that took 255 registers, with which no program fits beside a base product.
    """
    gate = tl.arange(0, GATES)
    left = tl.where(allowed, logits, -float("inf"))
    highest = tl.max(left, axis=0)
    chosen = gate < 0
    for _ in range(top_k):
        best = tl.max(left, axis=0)
        first = tl.min(tl.where(left == best, gate, GATES), axis=0)
        chosen = chosen | ((gate == first) & allowed)
        left = tl.where(gate == first, -float("inf"), left)
    below = tl.where(chosen, logits - tl.where(highest == -float("inf"), 0.0, highest), 0.0)
    powers = tl.where(chosen, tl.exp(below / temperature), 0.0)
    total = tl.sum(powers, axis=0)
    return powers / tl.where(total == 0.0, 1.0, total)


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def gate_weights_kernel(
    partials: tl.tensor,
    scale: tl.tensor,
    row_slots: tl.tensor,
    row_top_k: tl.tensor,
    row_temperatures: tl.tensor,
    row_masks: tl.tensor,
    row_touches: tl.tensor,
    row_shares: tl.tensor,
    slot_targets: tl.tensor,
    slot_adapters: tl.tensor,
    columns: tl.tensor,
    totals: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    SLICES: tl.constexpr,
    GATES: tl.constexpr,
    SPLITS: tl.constexpr,
    FIRST_TARGET: tl.constexpr,
    GROUP: tl.constexpr,
    TOTALS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """scale[slice, row, column] = the weight of the adapter that owns the column; 1 for rows without gates.

    Grid: (rows). The weights are added to the row's `totals` [TOTALS, GATES] besides, in the order of the launches.
    """
    row = tl.program_id(0)
    slot = tl.load(row_slots + row)
    offsets = tl.arange(0, BLOCK)
    if slot < 0:
        ones = tl.full([BLOCK], 1.0, tl.float32)
        for part in tl.static_range(SLICES):
            out = scale + (part * num_rows + row).to(tl.int64) * num_columns
            for first in range(0, num_columns, BLOCK):
                at = first + offsets
                tl.store(out + at, ones, mask=at < num_columns)
        return
    gate = tl.arange(0, GATES)
    allowed = ((tl.load(row_masks + row * (GATES // 32) + gate // 32) >> (gate % 32)) & 1) != 0
    top_k = tl.load(row_top_k + row)
    temperature = tl.load(row_temperatures + row)
    adapters = tl.load(slot_adapters + slot * GATES + gate)
    targets = tl.load(slot_targets + slot)
    share = tl.load(row_shares + row)
    counts = (share >= 0) & (((tl.load(row_touches + row) >> GROUP) & 1) != 0)
    for part in tl.static_range(SLICES):
        logits = tl.zeros([GATES], tl.float32)
        for split in tl.static_range(SPLITS):
            place = (split * num_rows + row).to(tl.int64) * SLICES + part
            logits += tl.load(partials + place * GATES + gate)
        weights = chosen_weights(logits, allowed, top_k, temperature, GATES)
        # a selection: without gates there is nothing in the slot, or what another router has left
        present = ((targets >> (FIRST_TARGET + part)) & 1) != 0
        weights = tl.where(present, weights, 0.0)
        total_at = totals + (share * TOTALS + part) * GATES + gate
        tl.store(total_at, tl.load(total_at, mask=counts, other=0.0) + weights, mask=counts)
        out = scale + (part * num_rows + row).to(tl.int64) * num_columns
        for first in range(0, num_columns, BLOCK):
            at = first + offsets
            owner = tl.load(columns + at, mask=at < num_columns, other=-1)
            own = tl.where(adapters[:, None] == owner[None, :], weights[:, None], 0.0)
            tl.store(out + at, tl.sum(own, axis=0), mask=at < num_columns)
