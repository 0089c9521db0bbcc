"""The engine's benchmark on a tiny model: every scenario, and the command line."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.shapes import SHAPES
from server.engine import peers
from server.engine.bench import main, run
from server.engine.bench_session import Session, Setup
from server.engine.workload import Lengths
from tests.engine.tiny_bench import TINY, silent


def test_adapters_touch_only_the_chosen_linears() -> None:
    with Session(replace(TINY, targets=("q_proj", "v_proj")), silent) as session:
        session.engine(Setup(3, 2))
        packed = session.adapters.read(session.adapters.digest(0), session.adapters.path(0))
        assert set(packed.groups) == {"qkv"}


def test_a_linear_that_no_model_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--targets", "q_proj,x_proj"])
    assert "'x_proj' is none of q_proj" in capsys.readouterr().err


def test_parameters_of_known_models() -> None:
    """As their model cards round them."""
    assert SHAPES["8b"].num_parameters == pytest.approx(8.03e9, rel=1e-3)
    assert SHAPES["1b"].num_parameters == pytest.approx(1.236e9, rel=1e-3)
    assert SHAPES["smollm2-135m"].num_parameters == pytest.approx(134.5e6, rel=1e-3)


@pytest.mark.slow
def test_throughput_serves_every_token_of_every_traffic() -> None:
    document = run(replace(TINY, traffic=("off", *TINY.traffic)), ["throughput"], silent)
    rows = document["scenarios"]["throughput"]["rows"]
    lengths = Lengths.uniform(8, 8, 14, 0)
    assert [row["traffic"] for row in rows] == ["off", "0", "1", "mix3"]
    assert {row["output_tokens"] for row in rows} == {sum(lengths.outputs)}
    assert {row["prompt_tokens"] for row in rows} == {sum(lengths.prompts)}
    # every token of a request but its last is a row, and the first comes with its prompt
    assert {row["token_rows"] for row in rows} == {sum(lengths.prompts) + sum(lengths.outputs) - 8}
    assert {row["preemptions"] for row in rows} == {0}
    assert rows[1]["loss"] == 0.0
    assert document["ratio"] == peers.NO_RATIO
    json.dumps(document, allow_nan=False)


def test_decode_steps_hold_their_context() -> None:
    rows = run(TINY, ["decode"], silent)["scenarios"]["decode"]["rows"]
    assert [(row["rows"], row["traffic"], row["adapters"]) for row in rows] == [
        (1, "0", 0),
        (1, "1", 1),
        (1, "mix3", 3),
        (3, "0", 0),
        (3, "1", 1),
        (3, "mix3", 9),
    ]
    assert all(row["context"] == pytest.approx(TINY.context, abs=2) for row in rows)
    assert all(row["ms_p10"] <= row["ms"] <= row["ms_p90"] for row in rows)


def test_rows_under_a_grammar_are_beside_free_ones() -> None:
    rows = run(replace(TINY, rows=(3,)), ["grammar"], silent)["scenarios"]["grammar"]["rows"]
    assert [row["traffic"] for row in rows] == ["0", "open_schema", "json_schema", "regex"]
    assert rows[0]["loss"] == 0
    assert rows[0]["mask_us"] is None
    assert all(row["mask_us"] > 0 and 0 <= row["late"] < 1 for row in rows[1:])


def test_many_adapters_go_through_few_pages() -> None:
    rows = run(TINY, ["many_adapters"], silent)["scenarios"]["many_adapters"]["rows"]
    popularity = ["0", "power 1", "power 0"]
    assert [(row["load"], row["traffic"]) for row in rows] == [
        (load, each) for load in (1.1, 0.75) for each in popularity
    ]
    assert [row["loss"] == 0 for row in rows] == [each == "0" for each in popularity] * 2
    for base in (rows[0], rows[3]):
        assert base["loads"] == base["adapters"] == 0
        assert base["warm"] == base["requests"]
        assert base["ttft_warm_p99_ms"] == base["ttft_p99_ms"], "who needs no adapter has waited for none"
    resident = TINY.device_adapters
    for row in (*rows[1:3], *rows[4:]):
        assert row["requests"] >= 8
        assert 0 < row["adapters"] <= TINY.many
        assert row["loads"] - row["evictions"] <= resident
        assert row["warm"] < row["requests"], "what had to be loaded was not there when it was asked for"
        # residents of the run before may serve this one; all other adapters had to come
        assert row["loads"] >= row["adapters"] - resident
    assert rows[1]["loads"] >= rows[1]["adapters"]


@pytest.mark.slow
def test_adapters_come_beside_decoding_rows() -> None:
    rows = run(replace(TINY, steps=40), ["loads"], silent)["scenarios"]["loads"]["rows"]
    assert [row["rate"] for row in rows] == [0, 100, 400]
    assert rows[0]["slower"] == 0
    assert all(0 < row["ms"] <= row["ms_p90"] <= row["ms_p99"] for row in rows)
    assert rows[2]["loads_per_second"] > rows[0]["loads_per_second"]


@pytest.mark.slow
def test_latency_waits_for_arrivals() -> None:
    document = run(replace(TINY, traffic=("0", "1"), loads=(0.5,)), ["latency"], silent)
    rows = document["scenarios"]["latency"]["rows"]
    assert [(row["traffic"], row["load"], row["requests"]) for row in rows] == [("0", 0.5, 8), ("1", 0.5, 8)]
    assert all(0 < row["ttft_p50_ms"] <= row["ttft_p99_ms"] for row in rows)


def test_memory_adds_up() -> None:
    options = replace(TINY, traffic=("1",))
    with Session(options, silent) as session:
        setup = Setup(3, 4)
        engine = session.engine(setup)
        assert session.engine(setup) is engine
        info = engine.info()
        assert info.memory["pages"] == session.page_memory(4)
        assert info.num_pages == dict.fromkeys(info.num_pages, 4)
        assert info.memory["kv"] == session.kv_memory(3)
        assert session.engine(Setup(2, 4)) is not engine


def test_command_line_prints_one_document(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = "--model tiny --scenario decode --adapters 0,1 --rows 1 --requests 4 --concurrency 1 --device cpu"
    arguments += " --longest 14 --steps 2 --context 30 --profiled 0 --commit abc"
    out = tmp_path / "deep" / "result.json"
    document = main([*arguments.split(), "--out", str(out)])
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == json.loads(out.read_text()) == json.loads(json.dumps(document))
    assert document["commit"] == "abc"
    assert document["arguments"]["traffic"] == ("0", "1")
    assert "| rows | adapters | ms a step |" in printed


@pytest.mark.parametrize("arguments", ["--scenario nothing", "--adapters many", "--adapters mix65"])
def test_command_line_refuses(arguments: str) -> None:
    with pytest.raises(SystemExit):
        main(["--model", "tiny", "--device", "cpu", *arguments.split()])


@pytest.mark.slow
def test_runs_without_the_packages_of_the_server() -> None:
    missing = ("fastapi", "httpx", "msgspec", "peft", "pydantic", "rich", "tokenizers", "typer", "uvicorn", "zmq")
    code = f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))\nimport server.engine.bench, kernels.bench"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_ratio_only_on_the_peers_gpu() -> None:
    assert peers.ratio(5126 * 1.2, "0", "8b", "NVIDIA H100 80GB HBM3") == pytest.approx(1.2)
    assert peers.ratio(5092, "64", "8b", "NVIDIA H100 80GB HBM3") == pytest.approx(2.0)
    assert peers.ratio(6000, "0", "8b", "NVIDIA H200") is None
    assert peers.ratio(6000, "mix3", "8b", "NVIDIA H100 80GB HBM3") is None
    assert peers.ratio(6000, "0", "1b", "NVIDIA H100 80GB HBM3") is None
