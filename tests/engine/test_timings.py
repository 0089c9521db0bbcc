"""What the engine tells of a request's time: spans of it, ending when they are told."""

from dataclasses import replace
from pathlib import Path

import pytest

from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.sequence import FinishReason, Output, Request, SamplingParams
from server.model.config import ModelConfig
from tests.engine.delayed_steps import CPU
from tests.engine.test_deadlines import Clock, last
from tests.engine.tiny_engine import PROMPTS, Registered

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def engine_of(model: Path, clock: Clock, **options: object) -> Engine:
    return Engine.from_config(EngineConfig(str(model), **{**CPU, **options}), clock)


def drain(engine: Engine, clock: Clock, seconds: float = 1.0) -> list[Output]:
    """All outputs; so much time passes after each step."""
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        clock.now += seconds
    return outputs


def test_queue_and_prefill(tiny_model: Path, clock: Clock) -> None:
    engine = engine_of(tiny_model, clock, max_num_seqs=1, max_batch_tokens=8)
    engine.add_request(Request("first", PROMPTS[0][:4], GREEDY))
    engine.add_request(Request("long", tuple(range(2, 26)), GREEDY))
    outputs = drain(engine, clock)
    told = {output.request_id: output.timings for output in outputs if output.timings is not None}
    assert (told["first"].queue, told["first"].prefill) == (0.0, 0.0)
    assert (told["long"].queue, told["long"].prefill) == (4.0, 2.0)  # three chunks of eight tokens
    assert told["long"].loading == 0.0
    assert [output.timings for output in outputs].count(None) == len(outputs) - 2
    engine.close()


def test_loading_is_a_part_of_the_queue(tiny_model: Path, clock: Clock, adapters: dict[str, Path]) -> None:
    engine, registered = engine_of(tiny_model, clock), Registered(tiny_model, adapters)
    engine.add_request(Request("r", PROMPTS[0], GREEDY, registered.mix({"all4": 1.0}), registered.paths))
    clock.now += 1.0  # it is queued in a step, however soon its adapter is read
    (timings,) = [output.timings for output in drain(engine, clock) if output.timings is not None]
    assert 1.0 <= timings.loading <= timings.queue
    engine.close()


def test_preemptions_are_told_with_the_end(tiny_model: Path, clock: Clock) -> None:
    model = ModelConfig.from_folder(tiny_model)
    block = 16 * 2 * model.num_layers * model.num_kv_heads * model.head_dim * 4
    engine = engine_of(tiny_model, clock, kv_memory=6 * block, max_model_len=80)
    params = replace(GREEDY, max_tokens=60)
    for name in "ab":
        engine.add_request(Request(name, PROMPTS[0][:8], params))
    outputs = drain(engine, clock)
    assert engine.scheduler.preemptions > 0
    told = [output for output in outputs if output.timings is not None and output.finish_reason is not None]
    times = [ago for output in told for ago in output.timings.preempted]  # type: ignore[union-attr]
    assert len(times) == engine.scheduler.preemptions
    assert all(ago > 0 for ago in times)
    one = told[0].request_id
    begin, end = (output.timings for output in outputs if output.request_id == one and output.timings is not None)
    assert begin is not None
    assert end is not None
    assert (begin.queue, begin.prefill) == (end.queue, end.prefill)
    engine.close()


def test_a_request_whose_time_is_over_says_where_it_was(tiny_model: Path, clock: Clock) -> None:
    engine = engine_of(tiny_model, clock, max_num_seqs=1, max_batch_tokens=8)
    engine.add_request(Request("runs", tuple(range(2, 60)), GREEDY, timeout=2.5))
    engine.add_request(Request("waits", PROMPTS[0], GREEDY, timeout=1.5))
    outputs = drain(engine, clock)
    for name, queue, prefill in (("waits", 2.0, None), ("runs", 0.0, 3.0)):
        output = last(outputs, name)
        assert output.finish_reason is FinishReason.TIMEOUT
        assert output.timings is not None
        assert (output.timings.queue, output.timings.prefill) == (queue, prefill)
    engine.close()
