"""Requests that give themselves so much time: they end in every phase, and hold nothing afterwards."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.config import EngineConfig
from server.engine.deadlines import SPARE, Deadlines
from server.engine.engine import Engine
from server.engine.sequence import FinishReason, Output, Request, SamplingParams, Sequence
from tests.engine.delayed_steps import CPU, DelayedSteps
from tests.engine.tiny_engine import PROMPTS, Registered, drain, run

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=[False, True], ids=["plain", "ahead"])
def engine(request: pytest.FixtureRequest, tiny_model: Path, clock: Clock) -> Engine:
    config = EngineConfig(str(tiny_model), **{**CPU, "max_num_seqs": 2, "max_batch_tokens": 16})
    made = Engine.from_config(config, clock)
    if request.param:
        made.runner.steps = DelayedSteps(made.runner, config.block_size)
    return made


def request(name: str, timeout: float | None, **fields: object) -> Request:
    return replace(Request(name, PROMPTS[1], GREEDY, timeout=timeout), **fields)  # type: ignore[arg-type]


def last(outputs: list[Output], name: str) -> Output:
    return [output for output in outputs if output.request_id == name][-1]


def test_while_it_runs(engine: Engine, clock: Clock) -> None:
    """It ends in the step after its time, with what it has; the others lose nothing."""
    alone = run(engine, [request("alone", None)])["alone"]
    engine.add_request(request("r", 5.0))
    engine.add_request(request("other", None))
    outputs = [output for _ in range(6) for output in engine.step()]
    clock.now += 5.0
    late = engine.step()
    assert last(late, "r").finish_reason is FinishReason.TIMEOUT
    assert last(late, "r").tokens == ()
    engine.check_integrity()
    outputs += late + drain(engine).get("other", [])
    tokens = {name: tuple(t for o in outputs if o.request_id == name for t in o.tokens) for name in ("r", "other")}
    assert tokens["other"] == alone
    assert tokens["r"] == alone[: len(tokens["r"])]
    assert 0 < len(tokens["r"]) < len(alone)
    assert engine.stats().kv_used_blocks == 0


def test_while_it_waits(engine: Engine, clock: Clock) -> None:
    for name in ("a", "b"):
        engine.add_request(request(name, None))
    engine.add_request(request("r", 3.0))
    engine.step()
    clock.now += 2.9
    assert "r" not in {output.request_id for output in engine.step()}
    clock.now += 0.1
    assert last(engine.step(), "r").finish_reason is FinishReason.TIMEOUT
    assert set(drain(engine)) == {"a", "b"}


def test_within_its_prompt(engine: Engine, clock: Clock) -> None:
    engine.add_request(request("r", 1.0, prompt=PROMPTS[5]))
    engine.step()
    clock.now += 1.0
    assert last(engine.step(), "r").finish_reason is FinishReason.TIMEOUT
    assert not drain(engine)
    assert engine.stats().kv_used_blocks == 0


def test_while_its_adapters_are_read(engine: Engine, clock: Clock, tiny_model: Path, adapters: dict[str, Path]) -> None:
    registered = Registered(tiny_model, adapters)
    engine.add_request(request("r", 1.0, mix=registered.mix({"all4": 1.0}), paths=registered.paths))
    clock.now += 1.0
    assert [output.finish_reason for output in engine.step()] == [FinishReason.TIMEOUT]
    engine.check_integrity()
    assert not drain(engine)


def test_what_ends_in_time_has_no_second_ending(engine: Engine, clock: Clock) -> None:
    engine.add_request(request("r", 1.0))
    assert drain(engine)["r"][-1].finish_reason is FinishReason.LENGTH
    engine.add_request(request("aborted", 1.0))
    engine.abort("aborted")
    clock.now += 5.0
    assert [output.finish_reason for output in engine.step()] == [FinishReason.ABORT]
    engine.add_request(request("r", None))
    assert drain(engine)["r"][-1].finish_reason is FinishReason.LENGTH, "the deadline of an earlier one of this name"


@given(
    timeouts=st.lists(st.floats(0, 100), max_size=40),
    ended=st.sets(st.integers(0, 39)),
    times=st.lists(st.floats(0, 100), min_size=1, max_size=5).map(sorted),
)
def test_each_is_told_once_and_in_order(timeouts: list[float], ended: set[int], times: list[float]) -> None:
    deadlines = Deadlines()
    sequences = [Sequence.of(request(str(number), None)) for number in range(len(timeouts))]
    for sequence, timeout in zip(sequences, timeouts, strict=True):
        deadlines.add(sequence, timeout)
    for number in ended & set(range(len(timeouts))):
        deadlines.remove(sequences[number])
    told: list[Sequence] = []
    for now in times:
        told += deadlines.expired(now)
        due = [(t, n) for n, t in enumerate(timeouts) if n not in ended and t <= now]
        assert told == [sequences[number] for _, number in sorted(due)]
    assert len(deadlines) == len(timeouts) - len(ended & set(range(len(timeouts)))) - len(told)


def test_ended_ones_are_forgotten() -> None:
    deadlines = Deadlines()
    for number in range(10_000):
        sequence = Sequence.of(request(str(number), None))
        deadlines.add(sequence, 600.0)
        deadlines.remove(sequence)
    assert len(deadlines) == 0
    assert len(deadlines._heap) <= SPARE
