"""The elementwise kernels compile for the GPUs that are supported, with and without their optional operands."""

import pytest

from kernels.elementwise import SILU_BLOCK, norm_warps
from kernels.rotary_store import HEADS, WARPS
from kernels.sampling import CHUNK, IDS_BLOCK
from tests.kernels.offline import SHARED_MEMORY, Case, Compiler


def absent(*names: str) -> dict[str, object]:
    return dict.fromkeys(names)


def cases(pdl: bool) -> list[Case]:
    row = {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "eps": "fp32"}
    summed = row | {"residual": "*bf16", "new_residual": "*bf16"}
    norm = {"N": 4096, "WEIGHT_ROWS": 1, "BLOCK": 4096, "PDL": pdl}
    activation = {"N": 14336, "BLOCK": SILU_BLOCK, "PDL": pdl}
    pointers = {"qkv": "*bf16", "cos": "*bf16", "sin": "*bf16", "slots": "*i32", "q": "*bf16"}
    caches = {"k_cache": "*bf16", "v_cache": "*bf16", "eps": "fp32"}
    heads = {"H": 32, "KV": 8, "D": 128, "K_STRIDE": 1024, "V_STRIDE": 1024, "HEADS": HEADS, "HALF": 64, "PDL": pdl}
    partials = {"maxima": "*fp32", "indices": "*i32"}
    logits = {"logits": "*bf16", "words": "i32"} | partials
    chosen = {"V": 128256, "CHUNK": CHUNK, "PDL": pdl}
    elementwise, rotary, sampling = "kernels.elementwise", "kernels.rotary_store", "kernels.sampling"
    none = absent("delta", "residual", "new_residual")
    return [
        Case(f"{elementwise}:rms_norm_kernel", row, norm | none, norm_warps(4096)),
        Case(f"{elementwise}:rms_norm_kernel", summed | {"delta": "*bf16"}, norm, norm_warps(4096)),
        Case(f"{elementwise}:silu_mul_kernel", {"x": "*bf16", "out": "*bf16"}, activation | absent("delta")),
        Case(f"{elementwise}:silu_mul_kernel", {"x": "*bf16", "delta": "*bf16", "out": "*bf16"}, activation),
        Case(f"{rotary}:rotary_store_kernel", pointers | caches, heads | absent("delta", "qk_norm"), WARPS),
        Case(f"{rotary}:rotary_store_kernel", pointers | caches | {"delta": "*bf16", "qk_norm": "*bf16"}, heads, WARPS),
        Case(f"{sampling}:greedy_kernel", logits, chosen | absent("masks") | {"MASKED": False}, 8),
        Case(f"{sampling}:greedy_kernel", logits | {"masks": "*i32"}, chosen | {"MASKED": True}, 8),
        Case(
            f"{sampling}:greedy_combine_kernel",
            partials | {"out": "*i64"},
            {"CHUNKS": 16, "BLOCK": 16, "PDL": pdl},
            1,
        ),
        Case(
            f"{sampling}:input_ids_kernel",
            {"ids": "*i32", "sources": "*i32", "sampled": "*i64", "out": "*i64", "tokens": "i32"},
            {"BLOCK": IDS_BLOCK, "PDL": pdl},
        ),
    ]


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels_compile_and_need_little(compiler: Compiler, capability: int) -> None:
    compiled = compiler.compile(cases(pdl=capability >= 90), capability)
    # reductions alone use shared memory, so that many programs share a multiprocessor
    assert all(result.shared <= SHARED_MEMORY[capability] // 32 for result in compiled)
