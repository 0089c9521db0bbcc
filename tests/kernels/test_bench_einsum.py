"""The paper's einsums give what our kernels give, and the comparison says what was measured."""

import json

import numpy as np
import pytest
import torch

from kernels import reference
from kernels.bench import main
from kernels.bench_cases import Where
from kernels.bench_einsum import compared, einsum_, peak_bytes, stacked
from kernels.bench_lora import pages_of
from kernels.mapping import RowSpan, build_mapping
from kernels.shapes import Linear

CPU = torch.device("cpu")
LINEAR = Linear(24, (32, 8, 8))


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("rank", [4, 16])
def test_einsums_are_the_mapping_matrix(rank: int, length: int) -> None:
    where = Where(CPU, torch.float32, seed=1)
    pages = pages_of(LINEAR, 6, rank, where)
    used = [(0, 1, 5), (2, 3, 4), (0, 3, 5)]
    weights = np.array([[0.5, 0.25, 0.25], [1.0, -1.0, 2.0], [1 / 3, 1 / 3, 1 / 3]])
    mapping = torch.zeros(3, 6)
    for row, own in enumerate(used):
        mapping[row, list(own)] = torch.tensor(weights[row], dtype=torch.float32)
    spans = [
        RowSpan(row * length, (row + 1) * length, own, tuple(weights[row].tolist()), (rank,) * 3)
        for row, own in enumerate(used)
    ]
    x, y = where.random(3 * length, 24), where.random(3 * length, 48)
    expected = reference.lora_(y.clone(), x, *pages, build_mapping(spans, CPU), LINEAR.slices)
    found = einsum_(y.clone().view(3, length, 48), x.view(3, length, 24), stacked(pages, LINEAR, rank), mapping)
    assert not torch.allclose(expected, y)
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)


def test_stacks_hold_only_the_ranks_in_use() -> None:
    factors = stacked(pages_of(LINEAR, 3, 4, Where(CPU, torch.float32)), LINEAR, 4)
    assert [(tuple(a.shape), tuple(b.shape)) for a, b in factors] == [
        ((3, 4, 24), (3, out, 4)) for out in LINEAR.slices
    ]


def test_comparison_by_rows() -> None:
    def line(rows: int, case: str, backend: str, us: float | None, adapters: int, peak: int) -> dict:
        found = {"op": "einsum", "rows": rows, "case": case, "backend": backend, "us_p50": us}
        return found | {"adapters": adapters, "peak_bytes": peak}

    lines = [
        line(16, "single", "triton", 9.0, 1, 100),
        line(16, "mix3", "triton", 10.0, 33, 110),
        line(16, "mix3", "torch einsum", 45.0, 33, 3300),
        line(8, "single", "triton", 9.0, 1, 100),
        line(8, "mix3", "triton", None, 20, 110),
        line(8, "mix3", "torch einsum", 45.0, 20, 2000),
        {"op": "linears", "rows": 8, "case": "mix3", "backend": "triton"},
    ]
    eight, sixteen = compared(lines)
    assert (eight["rows"], eight["mixture_share"], eight["einsum_us"]) == (8, None, 45.0)
    assert sixteen["mixture_share"] == pytest.approx(0.9)
    assert sixteen["einsum_share"] == pytest.approx(0.2)
    assert (sixteen["adapters"], sixteen["einsum_peak_bytes"] / sixteen["mixture_peak_bytes"]) == (33, 30.0)
    assert compared([]) == []


def test_no_peak_without_a_gpu() -> None:
    assert peak_bytes(lambda _: pytest.fail("not called"), CPU) is None


@pytest.mark.slow
def test_kernels_and_einsums_are_both_right(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model tiny --device cpu --ops einsum --rows 3 --rank 8 --tokens 2"
    assert main(arguments.split()) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["case"], row["backend"]) for row in document["rows"]] == [
        ("single", "triton"),
        ("mix3", "triton"),
        ("mix3", "torch einsum"),
    ]
    assert all(row["error"] < 1e-5 for row in document["rows"])
    assert document["einsum"][0]["rows"] == 3


@pytest.mark.gpu
def test_peak_is_what_a_call_allocates() -> None:
    device = torch.device("cuda")
    found = peak_bytes(lambda _: torch.empty(1 << 24, dtype=torch.uint8, device=device), device)
    assert found == 1 << 24
