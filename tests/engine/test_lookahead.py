"""Steps launched before the tokens of the step before are known: nothing that a client can see may change."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from server.engine.engine import Engine
from server.engine.fairness import OUTPUT_PRICE
from server.engine.sequence import FinishReason, Output, Request, Sequence
from tests.engine.delayed_steps import DelayedSteps, Make
from tests.engine.tiny_engine import GREEDY, PROMPTS, Registered, drain, outputs_of, texts, tokens_of

SAMPLED = replace(GREEDY, temperature=0.9, seed=7)


def count_charges(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Output tokens that each request's tenant is charged for."""
    charges: Counter[str] = Counter()
    queue = engine.scheduler.waiting
    charge = queue.charge

    def counted(sequence: Sequence, tokens: int, price: float) -> None:
        if price == OUTPUT_PRICE:
            charges[sequence.request.id] += tokens
        charge(sequence, tokens, price)

    monkeypatch.setattr(queue, "charge", counted)
    return charges


def test_the_host_is_one_step_ahead(make: Make) -> None:
    engine = make()
    engine.add_request(Request("r", PROMPTS[0], GREEDY))
    assert engine.step() == [], "launched, not committed"
    first = engine.step()
    assert [len(output.tokens) for output in first] == [1]
    assert first[0].timings is not None


def test_mixed_rows_give_the_same_texts(make: Make, registered: Registered) -> None:
    mixes = [{}, {"all4": 1.0}, {"all4": 0.5, "wide24": 0.8}, {"qv16": 1.0, "rslora8": -0.5}]
    requests = []
    for row in range(12):
        mix = registered.mix(mixes[row % 4])
        params = replace(GREEDY if row % 3 else SAMPLED, max_tokens=3 + row)
        requests.append(Request(str(row), PROMPTS[row % 6], params, mix, registered.paths, mix.digest.encode()))
    settings = {"max_num_seqs": 8, "max_batch_tokens": 40}
    assert texts(outputs_of(make(**settings), requests)) == texts(outputs_of(make(False, **settings), requests))


def test_a_late_stop_token_is_not_emitted_or_charged_twice(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    text = texts(outputs_of(make(False), [Request("r", PROMPTS[1], GREEDY)]))["r"]
    stop = text[4]
    length = text.index(stop)
    params = replace(GREEDY, stop_token_ids=frozenset({stop}))
    requests = [Request("r", PROMPTS[1], params), Request("other", PROMPTS[2], GREEDY)]
    engine, plain = make(), make(False)
    charges, plain_charges = count_charges(engine, monkeypatch), count_charges(plain, monkeypatch)
    outputs, expected = outputs_of(engine, requests), outputs_of(plain, requests)
    assert texts(outputs) == texts(expected)
    assert tokens_of(outputs["r"]) == text[:length]
    assert [output.finish_reason for output in outputs["r"]] == [None] * length + [FinishReason.STOP]
    assert charges == plain_charges == {"r": length + 1, "other": 12}


def test_an_ended_id_can_be_used_again_at_once(make: Make) -> None:
    """The step that was launched too much belongs to the sequence that ended, not to its successor."""
    engine = make()
    text = texts(outputs_of(make(False), [Request("r", PROMPTS[1], GREEDY)]))["r"]
    params = replace(GREEDY, stop_token_ids=frozenset({text[2]}))
    expected = texts(outputs_of(make(False), [Request("r", PROMPTS[3], GREEDY)]))["r"]
    assert tokens_of(outputs_of(engine, [Request("r", PROMPTS[1], params)])["r"]) == text[: text.index(text[2])]
    assert not engine.has_work
    assert tokens_of(outputs_of(engine, [Request("r", PROMPTS[3], GREEDY)])["r"]) == expected


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_max_tokens_is_exact_and_wastes_no_row(make: Make, count: int) -> None:
    engine = make(prefix_cache=False)
    outputs = outputs_of(engine, [Request("r", PROMPTS[1], replace(GREEDY, max_tokens=count))])["r"]
    assert len(tokens_of(outputs)) == count
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert isinstance(engine.runner.steps, DelayedSteps)
    assert engine.runner.steps.rows == len(PROMPTS[1]) + count - 1
    assert sum(rows for _, rows in engine.stats().steps) == engine.runner.steps.rows


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_abort_between_launch_and_commit(make: Make, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request("gone", PROMPTS[2], GREEDY), Request("stays", PROMPTS[3], SAMPLED)]
    expected = texts(outputs_of(make(False), requests))
    engine = make()
    charges = count_charges(engine, monkeypatch)
    for request in requests:
        engine.add_request(request)
    seen = [output for _ in range(steps) for output in engine.step()]
    engine.abort("gone")
    engine.check_integrity()
    rest = drain(engine)
    before = [token for output in seen if output.request_id == "gone" for token in output.tokens]
    assert tuple(before) == expected["gone"][: steps - 1]
    assert [(output.tokens, output.finish_reason) for output in rest["gone"]] == [((), FinishReason.ABORT)]
    assert (
        tokens_of([*(output for output in seen if output.request_id == "stays"), *rest["stays"]]) == expected["stays"]
    )
    assert charges["stays"] == 12


def test_an_id_after_its_abort(make: Make) -> None:
    engine = make()
    engine.add_request(Request("r", PROMPTS[2], GREEDY))
    engine.step()
    engine.abort("r")
    assert [output.finish_reason for output in engine.step()] == [FinishReason.ABORT]
    assert not engine.has_work
    assert engine.stats().kv_used_blocks == 0
    expected = texts(outputs_of(make(False), [Request("r", PROMPTS[1], GREEDY)]))
    assert texts(outputs_of(engine, [Request("r", PROMPTS[1], GREEDY)])) == expected


PARAMS = {
    "presence": replace(GREEDY, presence_penalty=1.5),
    "frequency": replace(SAMPLED, frequency_penalty=0.8),
    "repetition": replace(GREEDY, repetition_penalty=1.3),
    "biased": replace(SAMPLED, logit_bias={5: 4.0, 9: -50.0}),
    "late": replace(GREEDY, ignore_eos=False, min_tokens=6, stop_token_ids=frozenset(range(0, 512, 3))),
    "truncated": replace(SAMPLED, top_k=20, top_p=0.8, min_p=0.02),
    "logprobs": replace(SAMPLED, logprobs=4),
    "chosen only": replace(GREEDY, logprobs=0),
    "plain": GREEDY,
}


def test_every_way_of_sampling_gives_the_same(make: Make) -> None:
    """Rows whose next token needs the last one wait for it, beside rows that do not."""
    requests = [Request(name, PROMPTS[i % 6], params) for i, (name, params) in enumerate(PARAMS.items())]
    ahead, plain = outputs_of(make(), requests), outputs_of(make(False), requests)
    assert texts(ahead) == texts(plain)
    for name in ("logprobs", "chosen only"):
        found, expected = ([p for output in own[name] for p in output.logprobs] for own in (ahead, plain))
        assert len(found) == 12
        for one, other in zip(found, expected, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
    assert len(tokens_of(ahead["late"])) >= 6


def test_preemption_changes_nothing(make: Make, registered: Registered) -> None:
    roomy = make(False)
    tight = make(max_model_len=80, kv_memory=8 * roomy.runner.block_bytes(16))
    mix = registered.mix({"all4": 0.5, "qv16": 0.5})
    requests = []
    for row in range(10):
        params = replace((SAMPLED, GREEDY, PARAMS["presence"])[row % 3], max_tokens=24, seed=row)
        use = mix if row % 2 else registered.mix({})
        requests.append(Request(str(row), PROMPTS[row % 6], params, use, registered.paths, b"%d" % (row % 2)))
    assert texts(outputs_of(tight, requests)) == texts(outputs_of(roomy, requests))
    assert tight.stats().preemptions > 0
    assert tight.stats().kv_used_blocks == 0


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_yielding_a_row_to_another_tenant_changes_nothing(make: Make, prefix_cache: bool) -> None:
    """A row may yield while its next token is pending; it comes back, and its text is what it would have been."""
    flood, others = [], []
    for row in range(24):
        params = replace((SAMPLED, GREEDY, PARAMS["presence"])[row % 3], max_tokens=48 if row < 12 else 12, seed=row)
        (flood if row < 12 else others).append(Request(str(row), PROMPTS[row % 6], params, tenant=str(row < 12)))
    expected = texts(outputs_of(make(False), flood + others))
    engine = make(max_num_seqs=4, prefix_cache=prefix_cache)
    for request in flood:
        engine.add_request(request)
    found: dict[str, list[Output]] = {request.id: [] for request in flood + others}
    for _ in range(6):
        for output in engine.step():
            found[output.request_id].append(output)
    for request in others:
        engine.add_request(request)
    while engine.has_work:
        for output in engine.step():
            found[output.request_id].append(output)
        engine.check_integrity()
    assert texts(found) == expected
    assert 2 <= engine.scheduler.yielded <= 12
    assert engine.scheduler.yielded == engine.scheduler.preemptions


def test_a_row_that_overflows_ends_once(make: Make, registered: Registered) -> None:
    alone = texts(outputs_of(make(False), [Request("fine", PROMPTS[1], GREEDY, registered.mix({}))]))
    huge = registered.mix({"all4": 1e38})
    requests = [Request("huge", PROMPTS[1], GREEDY, huge, registered.paths, b"x"), Request("fine", PROMPTS[1], GREEDY)]
    outputs = outputs_of(make(), requests)
    assert [output.finish_reason for output in outputs["huge"]] == [FinishReason.ERROR]
    assert tokens_of(outputs["fine"]) == alone["fine"]


def test_requests_that_come_and_go(make: Make, registered: Registered) -> None:
    """Arrivals, aborts and stop tokens at random over little memory; each text is a prefix of the text alone."""
    numbers = torch.Generator().manual_seed(3)

    def number(most: int) -> int:
        return int(torch.randint(most, (), generator=numbers))

    roomy = make(False)
    engine = make(max_model_len=80, kv_memory=7 * roomy.runner.block_bytes(16), max_num_seqs=6, max_batch_tokens=32)
    registered.load(engine)
    names = list(registered.weights)
    requests = []
    for row in range(40):
        use = registered.mix({names[number(4)]: 1.0} if number(3) else {})
        params = replace(list(PARAMS.values())[number(len(PARAMS))], max_tokens=1 + number(20), seed=row)
        if number(2):
            params = replace(params, stop_token_ids=frozenset(range(number(9), 512, 9)))
        requests.append(Request(str(row), PROMPTS[number(6)], params, use, registered.paths, use.digest.encode()))
    expected = texts(outputs_of(roomy, requests))
    seen: dict[str, list[Output]] = {request.id: [] for request in requests}
    coming = list(requests)
    while coming or engine.has_work:
        for _ in range(min(len(coming), number(4))):
            engine.add_request(coming.pop(0))
        if not number(8):
            engine.abort(str(number(40)))
        for output in engine.step():
            seen[output.request_id].append(output)
        engine.check_integrity()
    aborted = {name for name, outputs in seen.items() if outputs[-1].finish_reason is FinishReason.ABORT}
    assert 0 < len(aborted) < 30
    for name, outputs in seen.items():
        assert sum(output.finish_reason is not None for output in outputs) == 1
        found = tuple(token for output in outputs for token in output.tokens)
        assert found == (expected[name][: len(found)] if name in aborted else expected[name])
    assert engine.stats().preemptions > 0
    assert engine.stats().pages["used"] == 0
