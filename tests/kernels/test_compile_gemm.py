"""Products of few rows compile for the GPUs that are supported, fit them and use what Hopper has."""

import pytest

from kernels.gemm_table import SHARED_MEMORY as SHARED_BUDGET
from kernels.gemm_table import GemmConfig, candidates
from tests.kernels.offline import SHARED_MEMORY, Case, Compiler

N, K = 6144, 4096
BIAS = {"bias": "*bf16"}


def case(config: GemmConfig, tma: bool, biased: bool = True) -> Case:
    def operand(rows: int) -> str:
        return f"tensordesc<bf16[{rows}, {config.block_k}]>" if tma else "*bf16"

    operands = {"x": operand(config.block_m), "weight": operand(config.block_n), "weight_pointer": "*bf16"}
    parts = {"partials": "*fp32", "counters": "*i32"} if config.splits > 1 else {}
    absent = dict.fromkeys(({"partials", "counters"} - set(parts)) | (set() if biased else {"bias"}))
    sizes = {"N": N, "K": K, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    switches = {"SPLITS": config.splits, "SWAPPED": config.swapped, "TMA": tma, "PDL": tma}
    return Case(
        "kernels.gemm:gemm_kernel",
        operands | (BIAS if biased else {}) | {"y": "*bf16", "rows": "i32"} | parts,
        sizes | switches | absent | {"PREFETCH": config.prefetch if tma else 0},
        config.warps,
        config.stages,
    )


def sample() -> list[GemmConfig]:
    """Of some classes the first candidate, and another one: without splits, or transposed."""
    found = {rows_class: candidates(rows_class, N, K) for rows_class in (16, 64, 128)}
    firsts = [configs[0] for configs in found.values()]
    others = [next(config for config in configs if config.splits == 1) for configs in found.values()]
    return [*firsts, *others, [config for config in found[16] if config.swapped][-1]]


def test_hopper_reads_tiles_by_tma_and_multiplies_in_warp_groups(compiler: Compiler) -> None:
    configs = sample()
    assert {config.splits for config in configs} > {1}
    for config, result in zip(configs, compiler.compile([case(c, tma=True) for c in configs], 90), strict=True):
        assert result.tma, config
        assert result.wgmma == ((config.block_n if config.swapped else config.block_m) >= 64), config
        # barriers, and the exchange of the last sums between threads, which may need more than few buffers
        assert result.shared <= config.shared_memory + 1024, config
        assert result.shared <= SHARED_BUDGET, config


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_pointers_instead_of_tma(compiler: Compiler, capability: int) -> None:
    configs = sample()[:2]
    results = compiler.compile([case(c, tma=False, biased=False) for c in configs], capability)
    for config, result in zip(configs, results, strict=True):
        assert not result.tma, config
        assert result.shared <= SHARED_MEMORY[capability], config
