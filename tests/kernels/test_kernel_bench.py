"""The benchmark of the operations, under Triton's interpreter where there is no GPU, and the choice of the table."""

import json
import math
from pathlib import Path

import pytest
import torch

from kernels.bench import OPS, main
from kernels.bench_cases import Case, Where
from kernels.bench_lora import different, popularity, spans_of
from kernels.bench_timing import error, measure, rotations
from kernels.gemm_table import Choice, GemmConfig, GemmTable
from kernels.shapes import ModelShape
from kernels.tune import Tuned, Tuning, choose, table_of, tune

FAST, SLOW = GemmConfig(16, 64, 128, 1, 4, 5), GemmConfig(16, 32, 128, 1, 4, 5)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_every_operation_is_right_and_has_its_set_up(
    op: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    arguments = f"--model tiny --ops {op} --rows 2 --popularity mix2 --context 20 --rank 8 --commit abc --out {out}"
    assert main(arguments.split()) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert [json.loads(line) for line in lines] == document["rows"]
    assert json.loads(out.read_text()) == document
    assert document["commit"] == "abc"
    for row in document["rows"]:
        assert row["error"] < 1e-2
        assert row["us_p20"] <= row["us_p50"] <= row["us_p80"]
        assert row["bytes"] > 0
        assert row["failed"] is None
    assert len({(row["op"], row["case"], row["rows"], row["backend"]) for row in document["rows"]}) == len(lines)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(*_: object) -> list[Case]:
        one = torch.ones(2, 2)
        good = Case("op", "good", 2, "torch", 1, 16, lambda _: one, lambda: one)
        bad = Case("op", "bad", 2, "torch", 1, 16, lambda _: one * 1.5, lambda: one)
        nan = Case("op", "nan", 2, "torch", 1, 16, lambda _: one * math.nan, lambda: one)
        failing = Case("op", "failing", 2, "torch", 1, 16, lambda _: one @ torch.ones(3, 3), lambda: one)
        return [good, bad, nan, failing]

    monkeypatch.setattr("kernels.bench.cases", wrong)
    assert main(["--model", "tiny", "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    rows = json.loads(printed.out.splitlines()[-1])["rows"]
    assert [row["us_p50"] is not None for row in rows] == [True, False, False, False]
    assert [row["error"] for row in rows[1:]] == [0.5, None, None]
    assert "RuntimeError" in rows[3]["failed"]
    assert "op bad torch, 2 rows: error 0.5" in printed.err


@pytest.mark.parametrize("arguments", [["--ops", "nothing"], ["--rank", "17"], ["--device", "cpu", "--model", "8b"]])
def test_command_line_refuses(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)


def test_popularity_kinds() -> None:
    assert popularity("0", 3) == [[], [], []]
    assert popularity("2", 3) == [[0], [1], [0]]
    mixed = popularity("mix3", 64, seed=1)
    assert mixed == popularity("mix3", 64, seed=1)
    assert {len(set(row)) for row in mixed} == {3}
    assert len({adapter for row in mixed for adapter in row}) > 50
    zipf = [adapter for (adapter,) in popularity("zipf", 4000)]
    assert zipf.count(0) > 6 * zipf.count(15) > 0
    assert list(different(("1", "8", "mix3"), 1, 0)) == ["1", "mix3"]


def test_spans_number_pages_from_the_first() -> None:
    spans = spans_of([[7], [], [3, 7]], first_page=10, rank=8)
    assert [(span.start, span.stop, span.pages) for span in spans] == [(0, 1, (11,)), (2, 3, (10, 11))]
    assert spans[1].weights == (0.5, 0.5)
    assert spans[1].ranks == (8, 8)


def test_choice_of_ours_or_cublas() -> None:
    assert choose({FAST: 10.0, SLOW: 11.0}, 12.0, 0.01) == Choice(FAST, True)
    assert choose({FAST: 10.09, SLOW: 11.0}, 10.0, 0.01) == Choice(FAST, True)
    assert choose({FAST: 10.11, SLOW: 11.0}, 10.0, 0.01) == Choice(FAST, False)
    assert choose({}, 10.0, 0.01) is None


def test_new_results_replace_old_ones_in_the_table(tmp_path: Path) -> None:
    slow, fast = Choice(SLOW, False), Choice(FAST, True)
    before = GemmTable({(64, 32, 16): fast, (96, 32, 16): fast, (8, 8, 16): fast})
    results = [
        Tuned((64, 32, 16), slow, 11.0, 10.0),
        Tuned((64, 32, 64), fast, 9.0, 10.0),
        Tuned((8, 8, 16), None, 1, 1),
    ]
    table = table_of(results, before)
    assert table.entries == {(64, 32, 16): slow, (96, 32, 16): fast, (64, 32, 64): fast, (8, 8, 16): fast}
    table.save("Some GPU", tmp_path)
    assert GemmTable.load("Some GPU", tmp_path) == table


def test_rotations_outgrow_the_cache() -> None:
    assert rotations(1 << 30) == 1
    assert rotations(16 << 20) * (16 << 20) > 3 * (50 << 20)
    assert rotations(1) == rotations(0) == 256


def test_error_is_relative_and_keeps_nan() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert error(expected * 1.01, expected) == pytest.approx(0.01, rel=1e-3)
    assert math.isnan(error(torch.tensor([3.0, math.nan]), expected))


def test_every_copy_is_used() -> None:
    seen: list[int] = []
    measure(seen.append, 5, torch.device("cpu"))
    assert sorted(set(seen)) == [0, 1, 2, 3, 4]


def test_random_inputs_follow_the_seed() -> None:
    where = Where(torch.device("cpu"), torch.float32, seed=3)
    assert torch.equal(where.random(4, 4), where.random(4, 4))
    assert not torch.equal(where.random(4, 4), Where(where.device, where.dtype, seed=4).random(4, 4))


@pytest.mark.slow
def test_every_product_is_tuned_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def few(rows_class: int, *_: int) -> list[GemmConfig]:
        return [GemmConfig(rows_class, 64, 32, 1, 4, 2)]

    shape, said = ModelShape(64, 32, 32, 1, 2, 1, 16, 1e4, tied=True), []
    monkeypatch.setattr("kernels.tune.candidates", few)
    monkeypatch.setattr("kernels.tune.ROW_CLASSES", (16, 32))
    where = Where(torch.device("cpu"), torch.float32)
    results = list(tune(shape, where, Tuning(each=1, tolerance=1e9), said.append))
    linears = [*shape.linears.values(), shape.head]
    keys = [(linear.outputs, linear.inputs, rows) for linear in linears for rows in (16, 32)]
    assert [tuned.key for tuned in results] == keys
    assert all(tuned.choice == Choice(few(tuned.key[2])[0], True) for tuned in results)
    assert all(tuned.cublas > 0 for tuned in results)
    assert list(tune(shape, where, Tuning(each=1, seconds=-1), said.append)) == []
    assert "no time left" in said[-1]


@pytest.mark.gpu
def test_tuning_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tune", "--model", "smollm2-135m", "--candidates", "2", "--tables", str(tmp_path)]
    assert main([*arguments, "--time-limit", "60"]) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    table = GemmTable.load(torch.cuda.get_device_name(), tmp_path)
    assert len(table.entries) >= len(done["tuned"]) > 0
