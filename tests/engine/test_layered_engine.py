"""MiLoRA through the whole engine, against its formulas over the `transformers` model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.engine.config import RequestError
from server.engine.engine import Engine
from server.engine.plan import Plan
from server.engine.sequence import NOT_FINITE, FinishReason, Output, Request
from tests.conftest import MakeAdapter
from tests.engine.plain_routing import ADAPTERS, MILORA, Made, Plain, make_prompt_router, routed
from tests.engine.routed_world import (
    SCORED,
    Asked,
    assert_equals_plain,
    assert_mixed_traffic_equals_plain,
    engine,
    outputs_with_aborts,
    routed_engine,
)
from tests.engine.tiny_engine import GREEDY, PROMPTS, Registered, drain, tokens_of

__all__ = ["engine"]


@pytest.fixture
def milora(tiny_model: Path, registered: Registered, tmp_path: Path) -> Made:
    return make_prompt_router(tmp_path / "milora", tiny_model, registered, ("all4",), **MILORA)


@pytest.fixture
def plain(tiny_model: Path, registered: Registered, milora: Made) -> Plain:
    return Plain(tiny_model, registered, milora)


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"top_k": 1},
        {"top_k": 7},
        {"pooling": "mean", "activation": "none"},
        {"pooling": "last"},
        {"pooling": "max", "norm": "none"},
        {"experts": "adapters", "top_k": 1},
        {"experts": "adapters", "top_k": 2, "null": True, "pooling": "mean"},
    ],
    ids=str,
)
def test_one_request_equals_the_formulas(
    tiny_model: Path, registered: Registered, tmp_path: Path, form: dict[str, Any]
) -> None:
    names = tuple(sorted(registered.weights)) if form.get("experts") == "adapters" else ("wide24",)
    made = make_prompt_router(tmp_path / "r", tiny_model, registered, names, **MILORA | form)
    plain, engine = Plain(tiny_model, registered, made), routed_engine(tiny_model)
    for number in (0, 2, 5):
        engine.add_request(routed(str(number), PROMPTS[number], registered, made.use(), SCORED))
        assert_equals_plain(drain(engine)[str(number)], plain, PROMPTS[number], made.use())


def test_prompts_and_layers_are_told_apart(plain: Plain, milora: Made) -> None:
    """Otherwise the other tests would show little."""
    chosen = [plain.decide(prompt, milora.use())[0] for prompt in PROMPTS]
    assert len({str(sorted(each.items())) for each in chosen}) > 1
    assert all(len({str([each[layer, "q_proj"], each[layer, "up_proj"]]) for layer in range(3)}) for each in chosen)


def test_all_linears_are_plain_lora(engine: Engine, milora: Made, registered: Registered) -> None:
    engine.add_request(routed("r", PROMPTS[4], registered, milora.use(7), SCORED))
    engine.add_request(Request("lora", PROMPTS[4], SCORED, registered.mix({"all4": 1.0}), registered.paths))
    outputs = drain(engine)
    assert tokens_of(outputs["r"]) == tokens_of(outputs["lora"])


@pytest.mark.parametrize("budget", [8, 16, 512])
def test_prompts_of_one_token_of_a_block_and_longer_than_a_step(
    tiny_model: Path, plain: Plain, milora: Made, registered: Registered, budget: int
) -> None:
    engine = routed_engine(tiny_model, max_batch_tokens=budget, max_num_seqs=8)
    prompts = ((7,), PROMPTS[3][:16], PROMPTS[3][:17], PROMPTS[5])
    for number, prompt in enumerate(prompts):
        engine.add_request(routed(str(number), prompt, registered, milora.use(), SCORED))
    outputs = drain(engine)
    for number, prompt in enumerate(prompts):
        assert_equals_plain(outputs[str(number)], plain, prompt, milora.use())


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_batch_tokens": 8, "max_num_seqs": 8}, {"kv_memory": 18 * 3072, "block_size": 4, "max_model_len": 64}],
)
def test_all_kinds_of_rows_share_batches_and_survive_chunks_and_preemption(
    tiny_model: Path, registered: Registered, milora: Made, plain: Plain, tmp_path: Path, settings: dict[str, Any]
) -> None:
    names = tuple(sorted(registered.weights))
    other = make_prompt_router(tmp_path / "other", tiny_model, registered, names, 8, **ADAPTERS)
    moa = make_prompt_router(tmp_path / "moa", tiny_model, registered, names, 9)
    made = {"milora": (plain, milora)}
    made |= {each.folder.name: (Plain(tiny_model, registered, each), each) for each in (other, moa)}
    asked: dict[str, Asked] = {}
    for number, prompt in enumerate(PROMPTS[2:5]):
        for which, (_, own) in made.items():
            asked[f"{which}-{number}"] = (which, prompt, own.use(only=own.names[number % 2 :] or own.names))
    assert_mixed_traffic_equals_plain(tiny_model, registered, made, asked, tmp_path / "gates", settings, seed=2)


@pytest.mark.parametrize("steps", range(5))
def test_preemption_in_the_middle_of_the_layers_changes_nothing(
    tiny_model: Path, plain: Plain, milora: Made, registered: Registered, steps: int
) -> None:
    engine = routed_engine(tiny_model, max_batch_tokens=16, max_num_seqs=8)  # three steps for the layers
    registered.load(engine)
    engine.add_request(routed("r", PROMPTS[5], registered, milora.use(), SCORED))
    outputs: list[Output] = []
    while not engine.scheduler.running:
        outputs += engine.step()
    for _ in range(steps):
        outputs += engine.step()
    (sequence,) = engine.scheduler.running
    assert sequence.undecided == (steps < 2)
    engine.scheduler._preempt(sequence, Plan(0))
    engine.check_integrity()
    outputs += drain(engine)["r"]
    assert_equals_plain(outputs, plain, PROMPTS[5], milora.use())


def test_the_prefix_is_found_once_the_choice_is_known(
    engine: Engine, plain: Plain, milora: Made, registered: Registered
) -> None:
    """Also by a longer prompt, if the same was chosen for it; never under another choice."""
    prompt = PROMPTS[5][:40]
    seen = []
    for number, use in enumerate((milora.use(), milora.use(), milora.use(2), milora.use(7), milora.use())):
        engine.add_request(routed(str(number), prompt, registered, use, SCORED))
        outputs = drain(engine)[str(number)]
        assert_equals_plain(outputs, plain, prompt, use)
        assert outputs[0].decided is not None
        seen.append((outputs[0].decided.cached, outputs[0].cached_tokens))
    assert seen == [(False, 0), (True, 32), (False, 0), (False, 0), (True, 32)]
    engine.add_request(Request("plain", prompt, SCORED, registered.mix({"all4": 1.0}), registered.paths))
    assert drain(engine)["plain"][0].cached_tokens == 32, "with all linears it is the adapter's own prefix"


def test_one_at_a_time_and_nobody_waits_for_more_than_a_step(
    tiny_model: Path, milora: Made, registered: Registered
) -> None:
    """While prompts go through their layers, the rows beside them get a token in every step."""
    engine = routed_engine(tiny_model, max_batch_tokens=16, max_num_seqs=8)
    registered.load(engine)
    engine.add_request(routed("first", PROMPTS[2], registered, milora.use(), GREEDY))  # for which the router is read
    drain(engine)
    engine.add_request(Request("base", PROMPTS[0], replace(GREEDY, max_tokens=40)))
    while not engine.scheduler.running:
        engine.step()
    for number in range(3):
        prompt = (*PROMPTS[5], number)
        engine.add_request(routed(str(number), prompt, registered, milora.use(), replace(GREEDY, max_tokens=2)))
    steps, most = 0, 0
    while any(f"{number}" in engine._sequences for number in range(3)):
        outputs = engine.step()
        steps += 1
        most = max(most, sum(bool(sequence.num_layers_left) for sequence in engine.scheduler.running))
        assert any(output.request_id == "base" for output in outputs), "a decoding row waits"
        engine.check_integrity()
    assert most == 1
    assert steps >= 9, "several steps for each prompt"
    drain(engine)


def test_the_next_one_takes_nothing_before_its_turn(tiny_model: Path, milora: Made, registered: Registered) -> None:
    engine = routed_engine(tiny_model, max_batch_tokens=64, max_num_seqs=8)  # more than one prompt needs
    registered.load(engine)
    for number in range(2):
        engine.add_request(routed(str(number), (*PROMPTS[5], number), registered, milora.use(), GREEDY))
    while not engine.scheduler.running:
        engine.step()
    assert [sequence.request.id for sequence in engine.scheduler.running] == ["0"]
    engine.step()
    assert [sequence.request.id for sequence in engine.scheduler.running] == ["0", "1"]
    drain(engine)


def test_states_that_overflow_decide_nothing(
    engine: Engine, tiny_model: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """The request ends with an error of its own, and the next one is not told what was never decided."""
    known = Registered(tiny_model, {"huge": make_adapter("huge", strength=1e18), "all4": make_adapter("fine", seed=3)})
    broken = make_prompt_router(tmp_path / "broken", tiny_model, known, ("huge",), **MILORA | {"top_k": 7})
    fine = make_prompt_router(tmp_path / "fine", tiny_model, known, ("all4",), **MILORA)
    for name, made in (("broken", broken), ("fine", fine), ("again", broken)):
        engine.add_request(routed(name, PROMPTS[2], known, made.use(), SCORED))
    outputs = drain(engine)
    assert outputs["broken"][-1].error == outputs["again"][-1].error == NOT_FINITE
    assert_equals_plain(outputs["fine"], Plain(tiny_model, known, fine), PROMPTS[2], fine.use())
    assert engine.deciding.num_remembered == 1


@pytest.mark.parametrize("steps", range(6))
def test_abort_in_the_middle(tiny_model: Path, plain: Plain, milora: Made, registered: Registered, steps: int) -> None:
    engine = routed_engine(tiny_model, max_batch_tokens=16, max_num_seqs=8)
    registered.load(engine)
    requests = [routed(each, PROMPTS[5], registered, milora.use(), SCORED) for each in ("first", "second")]
    outputs = outputs_with_aborts(engine, requests, steps, ["first"])
    assert outputs["first"][-1].finish_reason is FinishReason.ABORT
    assert_equals_plain(outputs["second"], plain, PROMPTS[5], milora.use())


def test_logprobs_of_a_layered_prompt(engine: Engine, milora: Made, registered: Registered) -> None:
    """It is computed once more, since what scores a token is not there between layers."""
    params = replace(SCORED, prompt_logprobs=0)
    engine.add_request(routed("r", PROMPTS[3], registered, milora.use(7), params))
    outputs = drain(engine)["r"]
    engine.add_request(Request("e", PROMPTS[3], params, registered.mix({"all4": 1.0}), registered.paths))
    expected = drain(engine)["e"]
    found = [each.logprob for output in outputs for each in output.prompt_logprobs]
    assert len(found) == len(PROMPTS[3]) - 1
    assert found == pytest.approx([each.logprob for output in expected for each in output.prompt_logprobs], abs=1e-4)


def test_without_a_prefix_cache(tiny_model: Path, plain: Plain, milora: Made, registered: Registered) -> None:
    engine = routed_engine(tiny_model, prefix_cache=False)
    engine.add_request(routed("r", PROMPTS[4], registered, milora.use(), SCORED))
    assert_equals_plain(drain(engine)["r"], plain, PROMPTS[4], milora.use())


def test_too_long_a_prompt_is_refused(tiny_model: Path, milora: Made, registered: Registered) -> None:
    engine = routed_engine(tiny_model, max_layered_tokens=20)
    with pytest.raises(RequestError, match=r"22 tokens, .* at most 20") as refusal:
        engine.add_request(routed("r", PROMPTS[2], registered, milora.use(), SCORED))
    assert (refusal.value.param, refusal.value.code) == ("prompt", "prompt_too_long")
    assert not engine.has_work
    engine.add_request(routed("short", PROMPTS[1], registered, milora.use(), SCORED))
    assert len(tokens_of(drain(engine)["short"])) == SCORED.max_tokens
