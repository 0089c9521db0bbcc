"""The engine's benchmark on a tiny model: what it counts, and that it asks for the same thing every time."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.types import TARGETS
from kernels.shapes import SHAPES
from server.engine import peers
from server.engine.bench import main, run
from server.engine.bench_measure import BenchError, DeviceWaits, covered, decode, serve
from server.engine.bench_session import Options, Session, Setup
from server.engine.config import EngineStats
from server.engine.sequence import FinishReason, Output, Request
from server.engine.workload import Lengths, SyntheticAdapters, Traffic, gamma_arrivals, popular, write_config
from server.model.config import ModelConfig

TINY = Options(
    model="tiny",
    device="cpu",
    repeats=1,
    traffic=("0", "1", "mix3"),
    rows=(1, 3),
    requests=8,
    concurrency=3,
    longest=14,
    context=12,
    steps=3,
    warm=1,
    profiled=0,
    seconds=0.05,
    many=10,
    device_adapters=4,
)


def silent(_: str) -> None:
    """Progress that nobody reads."""


@pytest.fixture
def session() -> Iterator[Session]:
    with Session(TINY, silent) as session:
        yield session


def test_adapters_touch_only_the_chosen_linears() -> None:
    with Session(replace(TINY, targets=("q_proj", "v_proj")), silent) as session:
        session.engine(Setup(3, 2))
        packed = session.adapters.read(session.adapters.digest(0), session.adapters.path(0))
        assert set(packed.groups) == {"qkv"}


def test_a_linear_that_no_model_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--targets", "q_proj,x_proj"])
    assert "'x_proj' is none of q_proj" in capsys.readouterr().err


@pytest.mark.parametrize("name", SHAPES)
def test_config_of_a_shape_is_that_of_a_model(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    write_config(shape, tmp_path)
    model = ModelConfig.from_folder(tmp_path)
    inputs, outputs = model.linear_shape.inputs, model.linear_shape.outputs
    assert sum(linear.inputs * linear.outputs for linear in shape.linears.values()) == sum(
        inputs[target] * outputs[target] for target in TARGETS
    )
    assert (model.num_layers, model.vocab_size, model.tie_word_embeddings) == (
        shape.num_layers,
        shape.vocab_size,
        shape.tied,
    )


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
    assert [row["traffic"] for row in rows] == ["0", "json_schema", "regex"]
    assert rows[0]["loss"] == 0
    assert rows[0]["mask_us"] is None
    assert all(row["mask_us"] > 0 and 0 <= row["late"] < 1 for row in rows[1:])


def test_many_adapters_go_through_few_pages() -> None:
    rows = run(TINY, ["many_adapters"], silent)["scenarios"]["many_adapters"]["rows"]
    assert [row["traffic"] for row in rows] == ["0", "power 1", "power 0"]
    assert rows[0]["loads"] == rows[0]["adapters"] == 0
    for row in rows[1:]:
        assert row["requests"] >= 8
        assert 0 < row["adapters"] <= TINY.many
        resident = TINY.device_adapters
        assert row["loads"] - row["evictions"] <= resident
    # residents of the first run may serve the second; all other adapters had to come
    assert rows[1]["loads"] >= rows[1]["adapters"]
    assert rows[2]["loads"] >= rows[2]["adapters"] - TINY.device_adapters


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


def test_same_seed_same_workload(session: Session) -> None:
    session.engine(Setup(3, 4))
    traffic, lengths = Traffic.parse("mix2of5"), session.lengths(8)
    first, again = (session.workload("w", traffic, lengths) for _ in range(2))
    assert first == again
    assert {len(request.mix.entries) for request in first.requests} == {2}
    assert all(set(request.paths) == set(request.mix.digests) for request in first.requests)
    assert len({request.mix for request in first.requests}) > 4
    other = Lengths.uniform(8, 8, 14, seed=1)
    assert other != lengths
    assert Lengths.uniform(8, 8, 14, seed=1) == other


def test_the_peers_workload_has_the_peers_tokens() -> None:
    options = Options(model="tiny", device="cpu")
    with Session(options, silent) as session:
        lengths = session.lengths(256)
        assert (sum(lengths.prompts), sum(lengths.outputs)) == peers.TOTALS
        assert len(session.lengths(128).prompts) == 128


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(1, 40),
    seed=st.integers(0, 5),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_lengths_move_to_any_total(count: int, seed: int, share: tuple[float, float]) -> None:
    totals = tuple(round(count * (8 + part * 24)) for part in share)
    lengths = Lengths.uniform(count, 8, 32, seed, (totals[0], totals[1]))
    assert (sum(lengths.prompts), sum(lengths.outputs)) == totals
    assert all(8 <= length <= 32 for length in (*lengths.prompts, *lengths.outputs))


def test_lengths_refuse_impossible_totals() -> None:
    with pytest.raises(ValueError, match=r"4 lengths in \[8, 16\] cannot sum to 65"):
        Lengths.uniform(4, 8, 16, 0, (65, 40))


def test_arrivals_have_their_rate_and_variation() -> None:
    gaps = np.diff(gamma_arrivals(20_000, 5.0, seed=0, variation=0.5), prepend=0.0)
    assert gaps.mean() == pytest.approx(0.2, rel=0.02)
    assert gaps.std() / gaps.mean() == pytest.approx(0.5, rel=0.03)
    poisson = np.diff(gamma_arrivals(20_000, 5.0, seed=0), prepend=0.0)
    assert poisson.std() / poisson.mean() == pytest.approx(1.0, rel=0.03)


def test_popularity_follows_its_exponent() -> None:
    counts = Counter(popular(50_000, 100, 1.0, seed=0))
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.15)
    uniform = Counter(popular(50_000, 100, 0.0, seed=0))
    assert max(uniform.values()) < 1.3 * min(uniform.values())


def test_adapters_are_distinct_readable_and_small(session: Session) -> None:
    shape = session.model.linear_shape
    adapters = SyntheticAdapters(shape, rank=8, targets=("q_proj", "v_proj"), dtype=torch.float32, seed=0, num_sets=2)
    packed = [adapters.read(adapters.digest(i), adapters.path(i)) for i in range(3)]
    assert len({own.digest for own in packed}) == 3
    assert packed[0].groups is packed[2].groups, "thousands of adapters must not take thousands of tensors"
    assert packed[0].group_ranks == {"qkv": 8}
    ((a, b),) = packed[0].groups["qkv"].pages
    assert a.shape == (shape.num_layers, 3, 8, shape.inputs["q_proj"])
    assert [bool(a[:, place].any()) for place in range(3)] == [True, False, True]
    contents = [
        page[0][layer, place]
        for own in packed[:2]
        for page in own.groups["qkv"].pages
        for layer in range(2)
        for place in (0, 2)
    ]
    assert not any(torch.equal(one, other) for i, one in enumerate(contents) for other in contents[:i])
    assert adapters.num_bytes == a.nbytes + b.nbytes
    with pytest.raises(ValueError, match="has digest"):
        adapters.read(adapters.digest(1), adapters.path(2))


def test_ratio_only_on_the_peers_gpu() -> None:
    assert peers.ratio(5126 * 1.2, "0", "8b", "NVIDIA H100 80GB HBM3") == pytest.approx(1.2)
    assert peers.ratio(5092, "64", "8b", "NVIDIA H100 80GB HBM3") == pytest.approx(2.0)
    assert peers.ratio(6000, "0", "8b", "NVIDIA H200") is None
    assert peers.ratio(6000, "mix3", "8b", "NVIDIA H100 80GB HBM3") is None
    assert peers.ratio(6000, "0", "1b", "NVIDIA H100 80GB HBM3") is None


class FakeEngine:
    """Gives every request a token a step, one step late; a step takes a second of `now`."""

    def __init__(self, broken: str = "") -> None:
        self.now = 0.0
        self.broken = broken
        self.running: dict[str, int] = {}
        self.late: list[str] = []

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.late)

    def add_request(self, request: Request) -> None:
        self.running[request.id] = request.params.max_tokens

    def abort(self, request_id: str) -> None:
        self.running.pop(request_id, None)

    def step(self) -> list[Output]:
        self.now += 1.0
        done, self.late = self.late, list(self.running)
        for name in self.late:
            self.running[name] -= 1
            if not self.running[name]:
                del self.running[name]
        if self.broken == "lost":
            return [Output(name, (1,)) for name in done[1:]]
        reason = FinishReason.ERROR if self.broken == "error" else None
        return [Output(name, (1,), finish_reason=reason, error="overflow" if reason else None) for name in done]

    def stats(self) -> EngineStats:
        return EngineStats()


def test_serve_measures_from_when_a_request_was_due(session: Session) -> None:
    engine = FakeEngine()
    session.engine(Setup(3, 0))
    work = session.workload("w", Traffic.parse("0"), Lengths.constant(2, 3, 4), [0.0, 2.5])

    def sleep(seconds: float) -> None:
        engine.now += seconds

    served = serve(engine, work, lambda: engine.now, sleep)
    assert served.output_tokens == 8
    # the first is there after two steps; the second was due within the third and got in with the fourth
    assert served.ttft == [2.0, 2.5]
    assert served.gaps == [1.0] * 6
    assert served.elapsed == 8.0


@pytest.mark.parametrize(("broken", "message"), [("lost", "gave 0 tokens, expected 40"), ("error", "overflow")])
def test_lost_tokens_and_errors_end_a_measurement(session: Session, broken: str, message: str) -> None:
    session.engine(Setup(3, 0))
    work = session.workload("w", Traffic.parse("0"), Lengths.constant(3, 3, 40))
    engine = FakeEngine(broken)
    with pytest.raises(BenchError, match=message):
        serve(engine, work, lambda: engine.now, lambda _: None)


def test_errors_end_decoding(session: Session) -> None:
    session.engine(Setup(3, 0))
    work = session.workload("w", Traffic.parse("0"), Lengths.constant(1, 3, 40))
    with pytest.raises(BenchError, match="overflow"):
        decode(FakeEngine("error"), work, warm=1, steps=4, profiled=0, cuda=False)


def test_decode_counts_tokens_of_late_steps(session: Session) -> None:
    session.engine(Setup(3, 0))
    work = session.workload("w", Traffic.parse("0"), Lengths.constant(3, 5, 40))
    engine = FakeEngine()
    done = decode(engine, work, warm=2, steps=4, profiled=0, cuda=False)
    assert len(done.seconds) == 4
    assert done.context == 5 + 1 + 2 + 2
    assert not engine.has_work
    short = session.workload("w", Traffic.parse("0"), Lengths.constant(3, 5, 4))
    with pytest.raises(BenchError, match="expected a token"):
        decode(FakeEngine(), short, warm=2, steps=4, profiled=0, cuda=False)


def test_waits_are_counted_once_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def synchronize() -> None:
        calls.append("device")
        torch.cuda.Event.synchronize(None)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda _: calls.append("event"))
    before = torch.cuda.Event.synchronize
    with DeviceWaits() as waits:
        torch.cuda.synchronize()
    assert calls == ["device", "event"]
    assert waits.seconds > 0
    assert torch.cuda.synchronize is synchronize
    assert torch.cuda.Event.synchronize is before


def test_share_covered_by_overlapping_spans() -> None:
    spans = [(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.75)]
    assert covered(spans, 0.0, 8.0) == 4 / 8
    assert covered(spans, 1.0, 5.5) == 2.5 / 4.5
    assert covered(spans, 3.0, 5.0) == 0.0
    assert covered([(0.0, 10.0)], 2.0, 4.0) == 1.0
