"""The product of few rows in Triton against fp64, and the table that says when to use it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.gemm import gemm, new_counters
from kernels.gemm_table import (
    MOST_CANDIDATES,
    SHARED_MEMORY,
    Choice,
    GemmConfig,
    GemmTable,
    candidates,
    row_class,
    slug,
)
from tests.kernels.poison import poisoned

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
# the interpreter takes descriptors anywhere, a GPU from Hopper on
PATHS = [False, True] if DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0) else [False]
CONFIGS = [
    GemmConfig(16, 16, 32, splits=1, warps=4, stages=2),
    GemmConfig(16, 32, 32, splits=3, warps=4, stages=2),
    GemmConfig(16, 64, 32, splits=2, warps=4, stages=2, swapped=True),
]
LINEARS = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
CLASSES = [16, 32, 64, 128]


def operands(rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((rows, k), (n, k), (n,)))  # type: ignore[return-value]


def error(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias.double()
    return ((out.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tma", PATHS)
@pytest.mark.parametrize("config", CONFIGS, ids=["whole", "split", "swapped"])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 40, 72), (17, 33, 96)])
def test_ragged_shapes(rows: int, n: int, k: int, config: GemmConfig, tma: bool, dtype: torch.dtype) -> None:
    x, weight, bias = operands(rows, n, k, dtype)
    counters = new_counters(DEVICE)
    with poisoned():
        plain = gemm(x, weight, None, config, counters=counters, tma=tma)
        biased = gemm(x, weight, bias, config, counters=counters, tma=tma)
    assert plain.dtype == dtype
    assert error(plain, x, weight, None) < TOLERANCE[dtype]
    assert error(biased, x, weight, bias) < TOLERANCE[dtype]
    assert not counters.any()


def test_values_beyond_the_operands_do_not_matter() -> None:
    """Tiles reach over the ends of x and of the weight, where NaN lies."""
    buffer = torch.full((2, 64, 40), torch.nan, device=DEVICE)
    x, weight = buffer[0, :5], buffer[1, :20]
    x.normal_()
    weight.normal_()
    for config in CONFIGS:
        for tma in PATHS:
            assert error(gemm(x, weight, None, config, tma=tma), x, weight, None) < 1e-6


def test_no_rows_and_wrong_shapes() -> None:
    x, weight, _ = operands(2, 16, 24, torch.float32)
    assert gemm(x[:0], weight, None, CONFIGS[0]).shape == (0, 16)
    with pytest.raises(ValueError, match=r"x \(2, 24\) and weight \(16, 20\) must share K, a multiple of 8"):
        gemm(x, weight[:, :20], None, CONFIGS[0])
    with pytest.raises(ValueError, match="with splits there can be 1"):
        gemm(torch.cat([x] * 9), weight, None, CONFIGS[1], counters=new_counters(DEVICE)[:1])


def test_the_table_is_read_back_as_written(tmp_path: Path) -> None:
    choices = Choice(CONFIGS[2], True), Choice(CONFIGS[0], False), Choice(CONFIGS[1], True)
    table = GemmTable({(64, 32, rows): choice for rows, choice in zip((16, 64, 128), choices, strict=True)})
    assert table.save("NVIDIA H200 (x)", tmp_path).name == "nvidia-h200-x.json"
    read = GemmTable.load("NVIDIA H200 (x)", tmp_path)
    assert read == table
    assert read.choose(1, 64, 32) == read.choose(16, 64, 32, torch.float16) == CONFIGS[2]
    assert read.choose(17, 64, 32) is None  # no entry of its own: that of 64
    assert read.choose(17, 64, 32, beside=True) == CONFIGS[0]
    assert read.choose(65, 64, 32) == read.choose(128, 64, 32) == CONFIGS[1]
    assert read.choose(129, 64, 32) is None
    assert read.choose(16, 32, 64) is None
    assert read.choose(16, 64, 32, torch.float32) is None


def test_an_unknown_gpu_has_an_empty_table_and_a_broken_file_is_named(tmp_path: Path) -> None:
    assert GemmTable.load("Riva TNT", tmp_path) == GemmTable()
    assert GemmTable().choose(16, 64, 32) is None
    for text in (
        "[",
        "{}}",
        '[{"n": 1}]',
        '[{"n": 1, "k": 1, "rows_class": 16, "alone": true, "config": {"bn": 1}}]',
        "3",
    ):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(ValueError, match=r"broken.json is not a list of \{n, k, rows_class, alone, config\}"):
            GemmTable.load("broken", tmp_path)


def test_names_and_classes() -> None:
    assert slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4-80gb"
    assert [row_class(rows) for rows in (1, 16, 17, 33, 128, 129)] == [16, 16, 32, 64, 128, None]


@pytest.mark.parametrize("rows_class", CLASSES)
def test_candidates_differ_and_leave_room(rows_class: int) -> None:
    for n, k in [*LINEARS, (128256, 4096), (960, 576), (576, 1536)]:
        found = candidates(rows_class, n, k)
        assert 1 <= len(set(found)) == len(found) <= MOST_CANDIDATES
        assert all(config.block_m == rows_class for config in found)
        assert all(config.shared_memory <= SHARED_MEMORY for config in found)
        assert all(config.warps == 4 or config.block_m * config.block_n > 128 * 128 for config in found)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336)])
@pytest.mark.parametrize("rows_class", CLASSES)
def test_sizes_of_a_model(rows_class: int, n: int, k: int) -> None:
    """A candidate of every number of splits: the same bits each time, and with the launch that overlaps."""
    counters = new_counters(DEVICE)
    for config in {config.splits: config for config in reversed(candidates(rows_class, n, k))}.values():
        for rows in (rows_class, rows_class // 2 + 1):
            x, weight, bias = operands(rows, n, k, torch.bfloat16)
            with poisoned():
                outs = [gemm(x, weight, bias, config, counters=counters, pdl=pdl) for pdl in (False, False, True, True)]
            assert error(outs[0], x, weight, bias) < TOLERANCE[torch.bfloat16]
            assert all(torch.equal(out, outs[0]) for out in outs[1:])
    assert not counters.any()


@pytest.mark.gpu
def test_a_graph_of_products_reads_new_inputs() -> None:
    first = GemmConfig(64, 64, 64, splits=2, warps=4, stages=4)
    x, up, _ = operands(33, 1536, 576, torch.bfloat16)
    _, down, _ = operands(33, 576, 1536, torch.bfloat16)
    counters = new_counters(DEVICE)

    def both() -> Tensor:
        middle = gemm(x, up, None, first, counters=counters, pdl=True)
        return gemm(middle, down, None, first, counters=counters, pdl=True)

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = both()
    for _ in range(3):
        x.normal_()
        graph.replay()
        captured = out.clone()
        assert torch.equal(captured, both())
        assert error(captured, (x.double() @ up.double().T).bfloat16(), down, None) < 2 * TOLERANCE[torch.bfloat16]
