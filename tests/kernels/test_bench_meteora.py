"""MeteoRA's own forms and ours are the same update, and the comparison says what was measured."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import meteora_forms
from kernels.bench import main
from kernels.bench_cases import Where
from kernels.bench_meteora import Embedded, Routing, Setting, compared, exact, gate_rows, inputs_of, settings_of
from tests.kernels.lora_pools import DEVICE

WIDTH, OUTPUTS = 64, 40


def case(routing: Routing = "uniform", k: int = 2, rank: int = 8) -> tuple[Tensor, Embedded, Setting]:
    where, setting = Where(DEVICE, torch.float32, seed=2), Setting(5, 7, k, routing, rank)
    return inputs_of(WIDTH, setting, where), Embedded.of(WIDTH, OUTPUTS, setting, where), setting


def token_by_token(x: Tensor, own: Embedded, k: int) -> Tensor:
    """The formulas without a single batched product."""
    out = torch.zeros(len(x), OUTPUTS, dtype=torch.float64, device=DEVICE)
    for token, values in enumerate(x.double()):
        logits = own.gates.double() @ values
        best = sorted(range(len(logits)), key=lambda i: -float(logits[i]))[:k]
        for weight, i in zip(logits[best].softmax(0), best, strict=True):
            out[token] += weight * (values @ own.a[i].double() @ own.b[i].double())
    return out


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("routing", ["uniform", "single"])
def test_the_reference_is_the_formulas(routing: Routing, k: int) -> None:
    x, own, _ = case(routing, k)
    torch.testing.assert_close(exact(x, own, k), token_by_token(x, own, k), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", [meteora_forms.loop, meteora_forms.bmm_torch, meteora_forms.bmm_triton])
@pytest.mark.parametrize(("k", "rank"), [(1, 8), (2, 8), (2, 4)])
def test_the_published_forms_are_the_reference(form: Callable[..., Tensor], k: int, rank: int) -> None:
    x, own, _ = case("uniform", k, rank)
    a = meteora_forms.split_factor(own.a) if form is meteora_forms.bmm_triton else own.a
    found = form(x, a, own.b, *meteora_forms.choose(x, own.gates, k))
    torch.testing.assert_close(found.double(), exact(x, own, k), rtol=1e-4, atol=1e-5)


def test_ranks_that_the_published_kernel_does_not_take() -> None:
    x, own, _ = case(rank=16)
    with pytest.raises(ValueError, match="rank is 16"):
        meteora_forms.bmm_triton(x, own.a, own.b, *meteora_forms.choose(x, own.gates, 2))


def test_routings() -> None:
    chosen = {}
    for routing in ("uniform", "single"):
        x, own, _ = case(routing)  # type: ignore[arg-type]
        chosen[routing], weights = meteora_forms.choose(x, own.gates, 2)
        assert (weights[:, 0] > weights[:, 1]).all()
    assert len({tuple(row) for row in chosen["single"].tolist()}) == 1
    assert len({tuple(row) for row in chosen["uniform"].tolist()}) > 2


def test_rows_may_choose_all_adapters_of_their_slot() -> None:
    rows = gate_rows(Setting(2, 48, 2, "uniform", 8), 64, Where(DEVICE, torch.float32))
    assert rows.masks.tolist() == [[-1, (1 << 16) - 1]] * 2
    assert rows.adapters[0, [0, 47, 48]].tolist() == [0, 47, -2]


def test_settings_are_all_combinations() -> None:
    settings = settings_of((1, 8), (8, 28), (1, 2), ("single",), 8)
    assert len(set(settings)) == 8
    assert settings[0] == Setting(1, 8, 1, "single", 8)


def test_comparison_by_setting() -> None:
    def line(backend: str, us: float | None, peak: int) -> dict:
        found = {"op": "meteora", "case": "28 adapters top-2 uniform", "rows": 64, "backend": backend, "us_p50": us}
        return found | {"eager_us_p50": 500.0, "peak_bytes": peak}

    lines = [line("loop", 9000.0, 100), line("bmm-torch", 300.0, 900), line("single", 50.0, 60)]
    lines += [line("triton", 100.0, 80), line("triton dense", 120.0, 90), {"op": "gemm", "rows": 64}]
    (found,) = compared(lines)
    assert found["best"] == "triton"
    assert found["speedup"] == {"loop": 90.0, "bmm-torch": 3.0, "single": 0.5}
    assert found["peak_ratio_to_loop"] == 0.8
    (found,) = compared([line("loop", 9000.0, 100), line("triton", None, 80)])
    assert (found["best"], found["speedup"], found["peak_ratio_to_loop"]) == (None, {}, None)
    assert compared([]) == []


@pytest.mark.slow
def test_all_forms_are_right_where_they_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model tiny --device cpu --ops meteora --rows 3 --adapters 5 --routing uniform"
    assert main(arguments.split()) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    forms = ["loop", "bmm-torch", "bmm-triton", "single", "triton", "triton dense"]
    assert [(row["top_k"], row["backend"]) for row in document["rows"]] == [(k, form) for k in (1, 2) for form in forms]
    assert all(row["error"] < 1e-5 for row in document["rows"])
    assert [row["rows"] for row in document["meteora"]] == [3, 3]
