"""Token-level routing at the edges: prompts of one token and of whole blocks, and requests that are cut short."""

from pathlib import Path

import pytest

from server.engine.engine import Engine
from server.engine.plan import Plan
from server.engine.sequence import FinishReason, Output
from tests.engine.gated_world import (
    SCORED,
    Plain,
    Routed,
    assert_equals_plain,
    engine,
    gated_engine,
    plain,
    request,
    router,
)
from tests.engine.routed_world import outputs_with_aborts
from tests.engine.tiny_engine import PROMPTS, Registered, drain

__all__ = ["engine", "plain", "router"]


@pytest.mark.parametrize("budget", [8, 16, 512])
def test_prompts_of_one_token_of_a_block_and_longer_than_a_step(
    tiny_model: Path, plain: Plain, router: Routed, registered: Registered, budget: int
) -> None:
    engine = gated_engine(tiny_model, max_batch_tokens=budget, max_num_seqs=8)
    prompts = ((7,), PROMPTS[3][:16], PROMPTS[3][:17], PROMPTS[5])
    for number, prompt in enumerate(prompts):
        engine.add_request(request(str(number), prompt, registered, router.use(), SCORED))
    outputs = drain(engine)
    for number, prompt in enumerate(prompts):
        assert_equals_plain(outputs[str(number)], plain, prompt, router.use())


@pytest.mark.parametrize(("length", "cached"), [(16, 0), (17, 16), (32, 16), (33, 32)])
def test_a_prompt_that_is_all_in_the_prefix_cache(
    engine: Engine, plain: Plain, router: Routed, registered: Registered, length: int, cached: int
) -> None:
    """Its last token is computed all the same: it is what the first answer comes from."""
    prompt = PROMPTS[5][:length]
    seen = []
    for name in ("first", "again"):
        engine.add_request(request(name, prompt, registered, router.use(), SCORED))
        outputs = drain(engine)[name]
        assert_equals_plain(outputs, plain, prompt, router.use())
        seen.append(outputs[0].cached_tokens)
    assert seen == [0, cached]


@pytest.mark.parametrize("steps", range(6))
def test_abort_in_the_middle(
    tiny_model: Path, plain: Plain, router: Routed, registered: Registered, steps: int
) -> None:
    engine = gated_engine(tiny_model, max_batch_tokens=16, max_num_seqs=8)  # several chunks a prompt
    registered.load(engine)
    requests = [request(name, PROMPTS[5], registered, router.use(), SCORED) for name in ("first", "second")]
    outputs = outputs_with_aborts(engine, requests, steps, ["first"])
    assert outputs["first"][-1].finish_reason is FinishReason.ABORT
    assert_equals_plain(outputs["second"], plain, PROMPTS[5], router.use())


@pytest.mark.parametrize("steps", range(6))
def test_preemption_in_the_middle_changes_nothing(
    tiny_model: Path, plain: Plain, router: Routed, registered: Registered, steps: int
) -> None:
    engine = gated_engine(tiny_model, max_batch_tokens=16, max_num_seqs=8)
    registered.load(engine)
    engine.add_request(request("r", PROMPTS[5], registered, router.use(), SCORED))
    outputs: list[Output] = []
    while not engine.scheduler.running:
        outputs += engine.step()
    for _ in range(steps):
        outputs += engine.step()
    (sequence,) = engine.scheduler.running
    engine.scheduler._preempt(sequence, Plan(0))
    engine.check_integrity()
    outputs += drain(engine)["r"]
    assert_equals_plain(outputs, plain, PROMPTS[5], router.use())
