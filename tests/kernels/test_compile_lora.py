"""The LoRA kernels compile for sm_80 and sm_90, and leave room for another program on their multiprocessor."""

from dataclasses import asdict, dataclass, replace

import pytest
import triton

from kernels.lora_config import LoraConfig, lora_config
from kernels.shapes import SHAPES
from kernels.tiles import TileShape
from tests.kernels.offline import SHARED_MEMORY, Case, Compiler

BESIDE = 64 * 1024
"""Bytes of shared memory that a program may use beside a base product with 150 KB of the 227 KB."""

SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
LINEARS = {name: (linear.inputs, linear.slices) for name, linear in SHAPES["8b"].linears.items()}
FEW = TileShape("rows", 16, 32, 64, 32)
MANY = TileShape("rows", 16, 256, 64, 256)
SHARED = TileShape("shared", 16, 256, 0, 64)
PREFILL = TileShape("rows", 64, 64, 64, 64)


@dataclass(frozen=True)
class Program:
    """One linear of an 8B model at one capacity."""

    linear: str
    shape: TileShape
    dtype: str
    scaled: bool = False
    pdl: bool = False

    @property
    def config(self) -> LoraConfig:
        return lora_config(self.shape, *LINEARS[self.linear], SIZES[self.dtype])


def ints(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "*i32")


def shrink_case(program: Program) -> Case:
    inputs, slices = LINEARS[program.linear]
    config = program.config.shrink
    pointers = dict.fromkeys(("x", "a_pages", "values"), f"*{program.dtype}")
    floats = dict.fromkeys(("partials", "scale", "tile_weights"), "*fp32")
    counts = dict.fromkeys(("num_values", "scale_slice", "scale_row"), "i32")
    return Case(
        "kernels.lora_kernels:shrink_kernel",
        pointers | floats | counts | ints("tile_pages", "tile_ranks", "tile_columns", "tile_rows"),
        {
            "INPUTS": inputs,
            "X_STRIDE": inputs,
            "A_STRIDE": len(slices) * 16 * inputs,
            "SLICES": len(slices),
            "JOINED": triton.next_power_of_2(len(slices)) if config.joined else 1,
            "ROWS": program.shape.block_rows,
            "BLOCK_K": config.block_k,
            "SPLITS": config.splits,
            "SCALED": program.scaled,
            "SHARED": program.shape.kind == "shared",
            "PDL": program.pdl,
        },
        config.warps,
        config.stages,
    )


def expand_case(program: Program) -> Case:
    _, slices = LINEARS[program.linear]
    config = program.config.expand
    widths = {f"N{i}": slices[i] if i < len(slices) else 0 for i in range(3)}
    common = widths | {"B_STRIDE": 16 * sum(slices), "BLOCK_N": config.block_n, "PDL": program.pdl}
    pointers = dict.fromkeys(("values", "b_pages", "delta"), f"*{program.dtype}")
    if program.shape.kind == "shared":
        return Case(
            "kernels.lora_kernels:expand_shared_kernel",
            pointers
            | ints("pages", "page_ranks", "page_count")
            | dict.fromkeys(("num_rows", "value_rows", "value_blocks"), "i32"),
            common | {"RANKS": 16, "ROWS": 64, "PAGES": config.pages},
            config.warps,
            config.stages,
        )
    splits = program.config.shrink.splits
    return Case(
        "kernels.lora_kernels:expand_rows_kernel",
        pointers
        | ({} if program.config.reduced else {"values": "*fp32"})
        | ints("tile_pages", "tile_ranks", "block_rows", "block_starts", "block_counts"),
        common
        | {
            "SLICES": len(slices),
            "ROWS": program.shape.block_rows,
            "SPLITS": 1 if program.config.reduced else splits,
        },
        config.warps,
        config.stages,
    )


def reduce_case(program: Program) -> Case:
    return Case(
        "kernels.lora_kernels:reduce_kernel",
        {"partials": "*fp32", "values": f"*{program.dtype}", "value_rows": "i32", "value_blocks": "i32"}
        | ints("tile_pages", "tile_columns", "tile_rows"),
        {
            "SLICES": len(LINEARS[program.linear][1]),
            "ROWS": program.shape.block_rows,
            "SPLITS": program.config.shrink.splits,
            "SHARED": program.shape.kind == "shared",
            "PDL": program.pdl,
        },
        1 if program.shape.block_rows == 16 else 4,
    )


def cases(program: Program) -> list[Case]:
    made = [shrink_case(program), expand_case(program)]
    return [*made, reduce_case(program)] if program.config.reduced else made


@pytest.mark.parametrize(
    ("shape", "splits", "columns"),
    [
        (FEW, (8, 16, 8, 14), (512, 256, 512, 256)),
        (MANY, (2, 4, 2, 7), (256, 128, 256, 128)),
        (PREFILL, (4, 4, 4, 4), (128, 128, 128, 128)),
        (replace(PREFILL, tiles=16), (8, 8, 8, 16), (128, 128, 128, 128)),
        (replace(PREFILL, tiles=1024), (2, 4, 2, 4), (128, 128, 128, 128)),
        (SHARED, (2, 4, 2, 7), (64, 32, 128, 32)),
        (replace(SHARED, tiles=32, pages=32), (8, 16, 8, 14), (64, 32, 128, 32)),
    ],
)
def test_an_8b_model_runs_with_the_measured_shapes(
    shape: TileShape, splits: tuple[int, ...], columns: tuple[int, ...]
) -> None:
    configs = [Program(linear, shape, "bf16").config for linear in LINEARS]
    assert tuple(config.shrink.splits for config in configs) == splits
    assert tuple(config.expand.block_n for config in configs) == columns


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("shape", [FEW, MANY, SHARED, PREFILL])
def test_splits_leave_no_rest(model: str, shape: TileShape) -> None:
    for linear in SHAPES[model].linears.values():
        shrink = lora_config(shape, linear.inputs, linear.slices, 2).shrink
        steps = -(-linear.inputs // shrink.block_k)
        assert steps % shrink.splits == 0
        assert steps * shrink.block_k < 2 * linear.inputs


DECODING = [Program(linear, shape, "bf16") for linear in LINEARS for shape in (FEW, MANY, SHARED)]


@pytest.mark.slow
def test_decoding_leaves_room_for_the_base_product(compiler: Compiler) -> None:
    unique = list({str(asdict(case)): case for program in DECODING for case in cases(program)}.values())
    assert max(result.shared for result in compiler.compile(unique, 90)) <= BESIDE


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels_compile_and_fit(compiler: Compiler, capability: int) -> None:
    programs = [
        Program("down", FEW, "bf16", scaled=True),
        Program("qkv", SHARED, "bf16"),
        Program("qkv", PREFILL, "bf16", scaled=True),
        Program("gate_up", SHARED, "fp32"),
    ]
    if capability >= 90:
        programs += [Program("o", MANY, "bf16", pdl=True), Program("gate_up", SHARED, "bf16", pdl=True)]
    done = compiler.compile([case for program in programs for case in cases(program)], capability)
    assert max(result.shared for result in done) <= SHARED_MEMORY[capability]
    if capability >= 90:
        assert max(result.shared for result in done[-5:]) <= BESIDE
