"""Log-probabilities of prompts, against `transformers` and `peft`, whatever the steps look like that compute them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from adapters_store.types import BASE
from server.engine.engine import Engine
from server.engine.plan import Plan
from server.engine.scoring import SCORED_ROWS, spans_to_score
from server.engine.sequence import NOT_FINITE, FinishReason, Output, Request, SamplingParams, TokenLogprobs
from tests.engine.delayed_steps import Make
from tests.engine.tiny_engine import PROMPTS, Registered, base_model, dense, drain, merged_model, run, tokens_of

SCORED = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, prompt_logprobs=3)
ONLY = replace(SCORED, max_tokens=0)
LONG = tuple((11 * column * column + 5 * column + 3) % 500 + 2 for column in range(2 * SCORED_ROWS + 9))


def scores_of(outputs: list[Output]) -> tuple[TokenLogprobs, ...]:
    return tuple(scored for output in outputs for scored in output.prompt_logprobs)


def ask(engine: Engine, *requests: Request) -> dict[str, list[Output]]:
    for request in requests:
        engine.add_request(request)
    return drain(engine)


def check(found: tuple[TokenLogprobs, ...], model: torch.nn.Module, prompt: tuple[int, ...], most: int = 3) -> None:
    """Every number is that of one plain forward pass over the whole prompt."""
    with torch.inference_mode():
        rows = torch.log_softmax(model(input_ids=torch.tensor([prompt])).logits[0, :-1].float(), dim=-1)
    assert len(found) == len(prompt) - 1
    for row, token, scored in zip(rows, prompt[1:], found, strict=True):
        assert scored.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert scored.rank == (row > row[token]).sum().item() + 1
        values, ids = row.topk(most)
        assert [token for token, _ in scored.top] == ids.tolist()
        assert [value for _, value in scored.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("budget", [8, 512])
def test_base_adapter_and_mixture_in_one_batch(
    make: Make,
    tiny_model: Path,
    adapters: dict[str, Path],
    registered: Registered,
    ahead: bool,
    budget: int,
) -> None:
    """Chunks of eight tokens or whole prompts; rows that decode and rows that want no scores share the steps."""
    mixed = {"all4": 0.5, "wide24": -0.8, "qv16": 1.1}
    models = {
        "base": base_model(tiny_model),
        "one": PeftModel.from_pretrained(base_model(tiny_model), str(adapters["all4"])).eval(),
        "mix": merged_model(tiny_model, [(weight, dense(registered, name)) for name, weight in mixed.items()]),
    }
    mixes = {"base": BASE, "one": registered.mix({"all4": 1.0}), "mix": registered.mix(mixed)}
    prompts = {"base": PROMPTS[4], "one": PROMPTS[3], "mix": PROMPTS[5]}
    engine = make(ahead, max_num_seqs=8, max_batch_tokens=budget)
    requests = [Request(name, prompts[name], SCORED, mixes[name], registered.paths) for name in mixes]
    plain = [
        Request(f"plain {name}", r.prompt, replace(SCORED, prompt_logprobs=None), r.mix, r.paths)
        for name, r in zip(mixes, requests, strict=True)
    ]
    outputs = ask(engine, *plain, *requests)
    for name, prompt in prompts.items():
        check(scores_of(outputs[name]), models[name], prompt)
        assert tokens_of(outputs[name]) == tokens_of(outputs[f"plain {name}"])
        assert not scores_of(outputs[f"plain {name}"])


def test_more_rows_than_are_scored_at_a_time(make: Make, tiny_model: Path) -> None:
    outputs = ask(make(), Request("r", LONG, ONLY))
    check(scores_of(outputs["r"]), base_model(tiny_model), LONG)


def test_a_prompt_alone(make: Make, tiny_model: Path) -> None:
    """max_tokens 0: the scores, no token, and an ending; also for a prompt as long as the context."""
    engine = make(max_model_len=len(LONG))
    outputs = ask(
        engine,
        Request("r", LONG, ONLY),
        Request("one", (5,), ONLY),
        Request("none", LONG[:3], replace(ONLY, prompt_logprobs=None)),
    )
    check(scores_of(outputs["r"]), base_model(tiny_model), LONG)
    for name in ("r", "one", "none"):
        assert tokens_of(outputs[name]) == ()
        assert outputs[name][-1].finish_reason is FinishReason.LENGTH
    assert scores_of(outputs["one"]) == scores_of(outputs["none"]) == ()
    assert engine.stats().kv_used_blocks == 0


def test_a_stop_token_does_not_end_a_prompt_alone(make: Make) -> None:
    engine = make()
    (token,) = run(engine, [Request("r", PROMPTS[0], replace(SCORED, max_tokens=1))])["r"]
    outputs = ask(engine, Request("r", PROMPTS[0], replace(ONLY, stop_token_ids=frozenset({token}))))
    assert outputs["r"][-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("ahead", [False, True])
def test_scored_prompts_do_not_read_the_prefix_cache_and_feed_it(make: Make, tiny_model: Path, ahead: bool) -> None:
    engine = make(ahead, max_batch_tokens=64)
    plain = Request("plain", PROMPTS[5], replace(SCORED, prompt_logprobs=None))
    run(engine, [plain])
    outputs = ask(engine, Request("r", PROMPTS[5], SCORED))
    check(scores_of(outputs["r"]), base_model(tiny_model), PROMPTS[5])
    assert [output.cached_tokens for output in outputs["r"]] == [0] * len(outputs["r"])
    again = ask(engine, replace(plain, id="again"))["again"]
    assert max(output.cached_tokens for output in again) == 48


@pytest.mark.parametrize("ahead", [False, True])
def test_preempted_prompts_are_scored_once(make: Make, tiny_model: Path, ahead: bool) -> None:
    """KV for hardly more than one of them: each number comes once and is right all the same."""
    block = make(False).runner.block_bytes(4)
    engine = make(ahead, block_size=4, max_model_len=64, kv_memory=17 * block, max_batch_tokens=16, max_num_seqs=4)
    params = replace(SCORED, max_tokens=20)
    outputs = ask(engine, *(Request(str(i), PROMPTS[2][i:], params, cache_key=b"%d" % i) for i in range(4)))
    assert engine.stats().preemptions
    for i in range(4):
        check(scores_of(outputs[str(i)]), base_model(tiny_model), PROMPTS[2][i:])


@pytest.mark.parametrize("ahead", [False, True])
def test_what_was_scored_before_a_preemption_may_come_from_the_cache(make: Make, tiny_model: Path, ahead: bool) -> None:
    engine = make(ahead, block_size=4, max_batch_tokens=16, max_num_seqs=4)
    engine.add_request(Request("r", PROMPTS[4], SCORED))
    outputs = [output for _ in range(2) for output in engine.step()]
    (sequence,) = engine.scheduler.running
    scored = sequence.first_unscored
    assert 0 < scored < len(PROMPTS[4]) - 1
    engine.scheduler._preempt(sequence, Plan(16))
    outputs += drain(engine)["r"]
    check(scores_of(outputs), base_model(tiny_model), PROMPTS[4])
    assert engine.stats().prefix_hits == scored // 4 * 4


def test_a_prompt_whose_scores_are_not_finite_ends_with_an_error(make: Make, registered: Registered) -> None:
    huge = registered.mix({"all4": 1e30})
    outputs = ask(make(), Request("r", PROMPTS[4], ONLY, huge, registered.paths), Request("other", PROMPTS[1], SCORED))
    assert outputs["r"][-1].error == NOT_FINITE
    assert len(scores_of(outputs["other"])) == len(PROMPTS[1]) - 1


def test_aborted_within_its_prompt(make: Make) -> None:
    engine = make(max_batch_tokens=16, max_num_seqs=8)
    engine.add_request(Request("r", LONG, SCORED))
    engine.step()
    engine.step()
    engine.abort("r")
    assert drain(engine)["r"][-1].finish_reason is FinishReason.ABORT
    assert engine.stats().kv_used_blocks == 0


def test_ordinary_steps_have_nothing_to_score(make: Make) -> None:
    engine = make()
    engine.add_request(Request("r", PROMPTS[0], replace(SCORED, prompt_logprobs=None)))
    assert spans_to_score(engine.scheduler.schedule().chunks) == []
