"""The kernels of the gates, and MeteoRA's own that the benchmark has, compile for sm_80 and sm_90."""

import pytest

from kernels.gate_rows import TOTALS
from kernels.gated import expand_config, gated_config
from kernels.gates import COLUMN_BLOCK, gate_config
from kernels.lora import shared_rows
from kernels.shapes import SHAPES, Linear
from tests.kernels.offline import SHARED_MEMORY, Case, Compiler

BESIDE = 64 * 1024
SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
LINEARS = SHAPES["8b"].linears


def ints(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "*i32")


def logits_case(linear: Linear, rows: int, gates: int, dtype: str) -> Case:
    config = gate_config(rows, linear.inputs, len(linear.slices), SIZES[dtype])
    return Case(
        "kernels.gate_kernels:gate_logits_kernel",
        {"x": f"*{dtype}", "gates": f"*{dtype}", "partials": "*fp32", "num_rows": "i32"}
        | ints("row_slots", "slot_counts"),
        {
            "INPUTS": linear.inputs,
            "X_STRIDE": linear.inputs,
            "SLOT_STRIDE": 32 * len(linear.slices) * gates * linear.inputs,
            "SLICES": len(linear.slices),
            "GATES": gates,
            "ROWS": config.rows,
            "BLOCK_K": config.block_k,
            "SPLITS": config.splits,
        },
        4,
        2,
    )


def weights_case(linear: Linear, rows: int, gates: int) -> Case:
    floats = dict.fromkeys(("partials", "scale", "row_temperatures", "totals"), "*fp32")
    names = ("row_slots", "row_top_k", "row_masks", "row_touches", "row_shares", "slot_targets", "slot_adapters")
    return Case(
        "kernels.gate_kernels:gate_weights_kernel",
        floats | ints(*names, "columns") | {"num_rows": "i32", "num_columns": "i32"},
        {
            "SLICES": len(linear.slices),
            "GATES": gates,
            "SPLITS": gate_config(rows, linear.inputs, len(linear.slices), 2).splits,
            "FIRST_TARGET": 4,
            "GROUP": 2,
            "TOTALS": TOTALS,
            "BLOCK": COLUMN_BLOCK,
        },
        max(1, gates // 32),
    )


def gated_cases(linear: Linear, rows: int, pages: int, ranks: int, dtype: str, *, pdl: bool = False) -> list[Case]:
    """The three kernels of `gated_delta` with slots for 64 gates."""
    slices, gates = len(linear.slices), 64
    config = gated_config(rows, linear.inputs, slices, pages * ranks, gates, SIZES[dtype])
    expand = expand_config(linear.outputs, max(linear.slices), ranks, SIZES[dtype])
    common = {"SLICES": slices, "PAGES": pages, "RANKS": ranks, "GATES": gates, "SPLITS": config.splits, "PDL": pdl}
    shrink = Case(
        "kernels.gated_kernels:gated_shrink_kernel",
        dict.fromkeys(("x", "a_pages", "gates"), f"*{dtype}")
        | dict.fromkeys(("ranks", "logits"), "*fp32")
        | ints("pages", "page_ranks", "page_count", "row_slots", "slot_counts")
        | {"num_rows": "i32"},
        common
        | {
            "INPUTS": linear.inputs,
            "X_STRIDE": linear.inputs,
            "A_STRIDE": slices * 16 * linear.inputs,
            "SLOT_STRIDE": 32 * slices * gates * linear.inputs,
            "ROWS": config.rows,
            "WIDTH": config.width,
            "BLOCK_K": config.block_k,
        },
        config.warps,
        config.stages,
    )
    names = ("row_slots", "row_top_k", "row_masks", "row_touches", "row_shares", "slot_targets", "slot_counts")
    weigh = Case(
        "kernels.gated_kernels:gated_weigh_kernel",
        dict.fromkeys(("ranks", "logits", "weights", "row_temperatures", "totals", "scale"), "*fp32")
        | {"values": f"*{dtype}"}
        | ints(*names, "slot_adapters", "columns")
        | dict.fromkeys(("num_rows", "value_rows", "scale_slice", "scale_row"), "i32"),
        common | {"FIRST_TARGET": 4, "GROUP": 2, "TOTALS": TOTALS, "SCALED": pdl},
        4,
    )
    widths = {f"N{i}": linear.slices[i] if i < slices else 0 for i in range(3)}
    last = Case(
        "kernels.lora_kernels:expand_shared_kernel",
        dict.fromkeys(("values", "b_pages", "delta"), f"*{dtype}")
        | ints("pages", "page_ranks", "page_count")
        | dict.fromkeys(("num_rows", "value_rows", "value_blocks"), "i32"),
        widths
        | {"B_STRIDE": 16 * linear.outputs, "BLOCK_N": expand.block_n, "RANKS": ranks, "PDL": pdl}
        | {"ROWS": shared_rows(rows), "PAGES": expand.pages},
        expand.warps,
        expand.stages,
    )
    return [shrink, weigh, last]


def published_case(inputs: int, outputs: int) -> Case:
    return Case(
        "kernels.meteora_forms:bmm_kernel",
        dict.fromkeys(("x", "a", "b", "updates"), "*bf16") | {"chosen": "*i64"},
        {
            "K": 2,
            "WIDTH": inputs // 16,
            "OUTPUTS": outputs,
            "RANK": 8,
            "PARTS": 16,
            "BLOCK_K": 64 if inputs < 2048 else 128,
            "BLOCK_N": 128,
        },
        8,
        4,
    )


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels_compile_and_fit(compiler: Compiler, capability: int) -> None:
    decoding = [
        *gated_cases(LINEARS["qkv"], 64, 32, 8, "bf16"),
        *gated_cases(LINEARS["gate_up"], 8, 32, 16, "bf16"),
        *gated_cases(LINEARS["down"], 64, 128, 16, "bf16"),
    ]
    others = [
        *gated_cases(LINEARS["gate_up"], 512, 32, 8, "bf16", pdl=capability >= 90),
        *gated_cases(LINEARS["qkv"], 64, 16, 16, "fp32"),
        logits_case(LINEARS["down"], 1, 64, "bf16"),
        logits_case(LINEARS["gate_up"], 2048, 32, "fp32"),
        weights_case(LINEARS["qkv"], 64, 32),
        weights_case(LINEARS["down"], 512, 64),
        published_case(4096, 14336),
        published_case(576, 192),
    ]
    done = compiler.compile([*decoding, *others], capability)
    assert max(result.shared for result in done) <= SHARED_MEMORY[capability]
    assert max(result.shared for result in done[: len(decoding)]) <= BESIDE
