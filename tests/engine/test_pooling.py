"""Sums of prompts' last hidden states, against `transformers` and `peft`, whatever the steps look like."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from adapters_store.types import BASE
from server.engine.plan import Plan
from server.engine.sequence import NOT_FINITE, FinishReason, Output, Request, SamplingParams
from tests.engine.delayed_steps import Make
from tests.engine.tiny_engine import PROMPTS, Registered, base_model, drain

POOLED = SamplingParams(max_tokens=0, pooled=True)


def check(outputs: list[Output], model: torch.nn.Module, prompt: tuple[int, ...]) -> None:
    """The sum is that of one plain forward pass over the whole prompt; the request has no answer."""
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
    parts = [np.frombuffer(output.pooled, np.float32) for output in outputs if output.pooled]
    np.testing.assert_allclose(np.sum(parts, axis=0), states.sum(dim=0).numpy(), atol=2e-4)
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert not any(output.tokens for output in outputs)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("budget", [8, 512])
def test_base_and_adapter_beside_rows_that_decode(
    make: Make, tiny_model: Path, adapters: dict[str, Path], registered: Registered, ahead: bool, budget: int
) -> None:
    engine = make(ahead, max_num_seqs=8, max_batch_tokens=budget)
    adapted = PeftModel.from_pretrained(base_model(tiny_model), str(adapters["all4"])).eval()
    plain = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, prompt_logprobs=1)
    for request in (
        Request("answers", PROMPTS[5], plain),
        Request("base", PROMPTS[4], POOLED, BASE),
        Request("adapter", PROMPTS[3], POOLED, registered.mix({"all4": 1.0}), registered.paths),
        Request("one token", PROMPTS[3][:1], POOLED),
    ):
        engine.add_request(request)
    outputs = drain(engine)
    check(outputs["base"], base_model(tiny_model), PROMPTS[4])
    check(outputs["adapter"], adapted, PROMPTS[3])
    check(outputs["one token"], base_model(tiny_model), PROMPTS[3][:1])
    assert sum(len(output.tokens) for output in outputs["answers"]) == 6
    assert sum(len(output.prompt_logprobs) for output in outputs["answers"]) == len(PROMPTS[5]) - 1
    assert not any(output.pooled for output in outputs["answers"])


@pytest.mark.parametrize("ahead", [False, True])
def test_the_prefix_cache_is_not_read_and_fed(make: Make, tiny_model: Path, ahead: bool) -> None:
    engine = make(ahead)
    for name in ("first", "second"):
        engine.add_request(Request(name, PROMPTS[5], POOLED))
        check(drain(engine)[name], base_model(tiny_model), PROMPTS[5])
    engine.add_request(Request("plain", PROMPTS[5], SamplingParams(max_tokens=1, ignore_eos=True)))
    assert drain(engine)["plain"][0].cached_tokens > 0


@pytest.mark.parametrize("ahead", [False, True])
def test_preempted_prompts_are_pooled_once(make: Make, tiny_model: Path, ahead: bool) -> None:
    """What was pooled before may come from the cache afterwards."""
    engine = make(ahead, block_size=4, max_batch_tokens=15, max_num_seqs=4)
    engine.add_request(Request("r", PROMPTS[4], POOLED))
    outputs = [output for _ in range(2) for output in engine.step()]
    (sequence,) = engine.scheduler.running
    pooled = sequence.first_unscored
    assert 0 < pooled < len(PROMPTS[4])
    assert pooled % 4, "some rows are to be computed again that have been pooled"
    engine.scheduler._preempt(sequence, Plan(15))
    outputs += drain(engine)["r"]
    check(outputs, base_model(tiny_model), PROMPTS[4])
    assert engine.stats().prefix_hits == pooled // 4 * 4


def test_states_that_are_not_finite_end_with_an_error(make: Make, registered: Registered) -> None:
    engine = make(False)
    engine.add_request(Request("r", PROMPTS[3], POOLED, registered.mix({"all4": 1e38}), registered.paths))
    ending = drain(engine)["r"][-1]
    assert (ending.finish_reason, ending.error) == (FinishReason.ERROR, NOT_FINITE)
