"""The attention kernels compile for the GPUs that are supported, fit them and use their tensor cores."""

import pytest
import torch

from kernels.attention import MIN_CHUNK, QUERY_BLOCK, decode_config, prefill_config
from tests.kernels.offline import SHARED_MEMORY, Case, Compiler

POINTERS = {"q": "*bf16", "k_cache": "*bf16", "v_cache": "*bf16", "out": "*bf16"}
LAYOUT = {"tables": "*i32", "table_starts": "*i32", "scale": "fp32"}
LENGTHS = {"decode_lens": "*i32", "rows": "i32"}
PARTIALS = {"partials": "*fp32", "logsums": "*fp32", "row_parts": "*i32"}
PARTS = {"PARTS": 66, "MIN_CHUNK": MIN_CHUNK, "ROWS": 64}
SHAPES = [(32, 8, 128), (9, 3, 64)]


def constants(heads: int, kv_heads: int, dim: int, pdl: bool) -> dict[str, object]:
    inner = {"HEADS": heads, "DIM": dim, "WIDTH": dim, "WINDOW": 0, "PDL": pdl}
    token = kv_heads * dim
    return inner | {"GROUP": heads // kv_heads, "BLOCK": 16, "BLOCK_STRIDE": 16 * token, "TOKEN_STRIDE": token}


def decode_case(heads: int, kv_heads: int, dim: int, pdl: bool) -> Case:
    config = decode_config(torch.bfloat16, heads // kv_heads, dim)
    return Case(
        "kernels.attention_kernels:decode_kernel",
        POINTERS | PARTIALS | LAYOUT | LENGTHS,
        constants(heads, kv_heads, dim, pdl) | PARTS | {"PACKED": config.rows, "TILE": config.tile},
        config.warps,
        config.stages,
    )


def prefill_case(heads: int, kv_heads: int, dim: int, pdl: bool) -> Case:
    config = prefill_config(torch.bfloat16, heads // kv_heads, dim)
    packed = 4
    shape = {"PACKED": packed, "QUERIES": min(config.rows // packed, QUERY_BLOCK), "TILE": config.tile}
    return Case(
        "kernels.attention_kernels:prefill_kernel",
        POINTERS | LAYOUT | {"query_blocks": "*i32"},
        constants(heads, kv_heads, dim, pdl) | shape,
        config.warps,
        config.stages,
    )


def combine_case(heads: int, kv_heads: int, dim: int, pdl: bool) -> Case:
    names = ("HEADS", "DIM", "WIDTH", "PDL")
    sizes = {name: value for name, value in constants(heads, kv_heads, dim, pdl).items() if name in names}
    return Case("kernels.attention_kernels:combine_kernel", PARTIALS | {"out": "*bf16"}, sizes, warps=2)


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels_compile_fit_and_use_tensor_cores(compiler: Compiler, capability: int) -> None:
    pdl = capability >= 90
    cases = [make(*shape, pdl) for shape in SHAPES for make in (decode_case, combine_case, prefill_case)]
    compiled = compiler.compile(cases, capability)
    for case, result in zip(cases, compiled, strict=True):
        assert result.shared <= SHARED_MEMORY[capability]
        assert result.wgmma == (capability >= 90 and "prefill" in case.kernel)
    # two decoding programs side by side on a multiprocessor, whose loads overlap
    assert all(2 * result.shared <= SHARED_MEMORY[capability] for result in compiled[::3])
