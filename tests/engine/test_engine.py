"""The whole engine in-process on a tiny model, against `transformers` and `peft`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from adapters_store.types import Composition, Mix
from server.engine.config import EngineConfig, RequestError
from server.engine.engine import Engine
from server.engine.sequence import FinishReason, Request
from server.model.config import ModelConfig
from tests.conftest import MakeAdapter
from tests.engine.tiny_engine import (
    GREEDY,
    PROMPTS,
    SMALL,
    Registered,
    base_model,
    dense,
    drain,
    merged_model,
    reference,
    run,
    tokens_of,
)


@pytest.fixture
def engine(tiny_model: Path) -> Engine:
    return Engine.from_config(EngineConfig(str(tiny_model), **SMALL))


def test_greedy_text_equals_transformers(engine: Engine, tiny_model: Path) -> None:
    model = base_model(tiny_model)
    texts = run(engine, [Request(str(i), prompt, GREEDY) for i, prompt in enumerate(PROMPTS)])
    assert texts == {str(i): reference(model, prompt) for i, prompt in enumerate(PROMPTS)}


@pytest.mark.parametrize("name", ["all4", "wide24", "rslora8", "qv16"])
def test_one_adapter_equals_peft(
    engine: Engine, tiny_model: Path, adapters: dict[str, Path], registered: Registered, name: str
) -> None:
    model = PeftModel.from_pretrained(base_model(tiny_model), str(adapters[name])).eval()
    mix = registered.mix({name: 1.0})
    requests = [Request(str(i), p, GREEDY, mix, registered.paths) for i, p in enumerate(PROMPTS)]
    expected = {str(i): reference(model, prompt) for i, prompt in enumerate(PROMPTS)}
    assert run(engine, requests) == expected
    assert expected["0"] != reference(base_model(tiny_model), PROMPTS[0]), "the adapter should change the text"


def test_every_row_its_own_mix(engine: Engine, tiny_model: Path, registered: Registered) -> None:
    """Base, singles, mixtures with negative weights, a fusion and a selection, all in the same steps."""
    mixtures: list[dict[str, float]] = [
        {},
        {"all4": 1.0},
        {"all4": 0.5, "wide24": 0.8},
        {"all4": 0.7, "wide24": -0.4, "qv16": 1.3},
        {"rslora8": 0.25, "qv16": 0.25, "wide24": 0.25, "all4": 0.25},
    ]
    requests = [
        Request(str(i), PROMPTS[i], GREEDY, registered.mix(weights), registered.paths)
        for i, weights in enumerate(mixtures)
    ]
    fused = {"all4": 1.0, "wide24": 3.0}
    requests.append(Request("f", PROMPTS[5], GREEDY, registered.mix(fused, Composition.FUSION), registered.paths))
    chosen = registered.mix({"all4": 0.2, "qv16": 0.9}, Composition.SELECTION)
    requests.append(Request("s", PROMPTS[5], GREEDY, chosen, registered.paths))
    texts = run(engine, requests)
    for i, weights in enumerate(mixtures):
        model = merged_model(tiny_model, [(weight, dense(registered, name)) for name, weight in weights.items()])
        assert texts[str(i)] == reference(model, PROMPTS[i]), weights
    assert texts["f"] == reference(merged_model(tiny_model, [(1.0, fusion(registered, fused))]), PROMPTS[5])
    assert texts["s"] == reference(merged_model(tiny_model, [(1.0, dense(registered, "qv16"))]), PROMPTS[5])


def fusion(registered: Registered, weights: dict[str, float]) -> dict[tuple[int, str], torch.Tensor]:
    """(sum w s B)(sum w A) with weights normalised and ranks zero-padded, written out."""
    total = sum(weights.values())
    result = {}
    for key in registered.weights["all4"].pairs:
        pairs = [(weight / total, registered.weights[name].pairs[key]) for name, weight in weights.items()]
        rank = max(pair.rank for _, pair in pairs)
        a = sum(w * torch.nn.functional.pad(pair.a, (0, 0, 0, rank - pair.rank)) for w, pair in pairs)
        b = sum(w * pair.scale * torch.nn.functional.pad(pair.b, (0, rank - pair.rank)) for w, pair in pairs)
        result[key] = b @ a
    return result


def test_a_row_does_not_depend_on_its_neighbours(engine: Engine, registered: Registered) -> None:
    """Each of 32 rows with its own mix and its own sampling gives what it gives alone."""
    names = list(registered.weights)
    requests = []
    for row in range(32):
        weights = {names[row % 4]: 1.0, names[(row // 4) % 4]: 0.5} if row % 5 else {}
        params = GREEDY if row % 2 else replace(GREEDY, temperature=0.8, top_p=0.9, top_k=40, seed=row)
        requests.append(Request(str(row), PROMPTS[row % 6], params, registered.mix(weights), registered.paths))
    requests = [replace(request, cache_key=request.mix.digest.encode()) for request in requests]
    together = run(engine, requests)
    for request in requests:
        assert run(engine, [request])[request.id] == together[request.id]


def test_a_cached_prefix_equals_cold(engine: Engine, registered: Registered) -> None:
    prompt, mix = PROMPTS[5], registered.mix({"all4": 1.0})
    cold = Request("cold", prompt, GREEDY, mix, registered.paths, cache_key=b"all4")
    engine.add_request(cold)
    first = drain(engine)["cold"]
    engine.add_request(replace(cold, id="warm"))
    second = drain(engine)["warm"]
    assert tokens_of(first) == tokens_of(second)
    assert first[0].cached_tokens == 0
    assert second[0].cached_tokens == len(prompt) // 16 * 16 > 0


def test_a_prefix_is_not_shared_between_mixes(engine: Engine, tiny_model: Path, registered: Registered) -> None:
    run(engine, [Request("a", PROMPTS[5], GREEDY, registered.mix({"all4": 1.0}), registered.paths, cache_key=b"all4")])
    engine.add_request(Request("b", PROMPTS[5], GREEDY, cache_key=b"base"))
    outputs = drain(engine)["b"]
    assert outputs[0].cached_tokens == 0
    assert tokens_of(outputs) == reference(base_model(tiny_model), PROMPTS[5])


@pytest.mark.parametrize("budget", [4, 7, 64])
def test_chunked_prefill_changes_nothing(tiny_model: Path, registered: Registered, engine: Engine, budget: int) -> None:
    config = EngineConfig(str(tiny_model), max_num_seqs=4, max_batch_tokens=budget, **SMALL)
    mix = registered.mix({"wide24": 1.0})
    requests = [Request(str(i), p, GREEDY, mix, registered.paths, cache_key=b"w") for i, p in enumerate(PROMPTS)]
    assert run(Engine.from_config(config), requests) == run(engine, requests)


def test_preemption_changes_nothing(tiny_model: Path, registered: Registered, engine: Engine) -> None:
    """KV for little more than one sequence: the others are preempted and recomputed again and again."""
    model = ModelConfig.from_folder(tiny_model)
    block = 16 * 2 * model.num_layers * model.num_kv_heads * model.head_dim * 4
    config = EngineConfig(str(tiny_model), max_model_len=80, **{**SMALL, "kv_memory": 8 * block})
    mix = registered.mix({"all4": 0.5, "qv16": 0.5})
    params = replace(GREEDY, max_tokens=24, temperature=1.0, seed=5)
    requests = [Request(str(i), p, params, mix, registered.paths, cache_key=b"m") for i, p in enumerate(PROMPTS)]
    tight = Engine.from_config(config)
    assert run(tight, requests) == run(engine, requests)
    assert tight.stats().preemptions > 0


def test_few_pages_only_make_requests_wait(tiny_model: Path, registered: Registered, engine: Engine) -> None:
    """A pool of three pages a group serves mixes that together need many more."""
    names = list(registered.weights)
    requests = [
        Request(
            str(i),
            PROMPTS[i % 6],
            GREEDY,
            registered.mix({names[i % 4]: 1.0}),
            registered.paths,
            cache_key=b"%d" % (i % 4),
        )
        for i in range(12)
    ]
    runner = engine.runner
    one = runner.pool.num_bytes // next(iter(runner.pool.num_pages.values()))
    small = Engine.from_config(EngineConfig(str(tiny_model), **{**SMALL, "page_memory": 3 * one}))
    assert set(small.info().num_pages.values()) == {3}
    assert run(small, requests) == run(engine, requests)
    stats = small.stats()
    assert stats.adapter_evictions > 0
    assert len(stats.adapter_reads) == stats.adapters_host == 4
    assert small.stats().adapter_reads == ()


def test_memory_is_what_was_planned(engine: Engine) -> None:
    info, runner = engine.info(), engine.runner
    assert info.memory["kv"] == info.num_kv_blocks * runner.block_bytes(16) == runner.kv_bytes
    assert (1 << 22) - runner.block_bytes(16) < info.memory["kv"] <= 1 << 22
    assert info.memory["pages"] <= 1 << 22


def test_abort_in_every_phase(engine: Engine, registered: Registered) -> None:
    engine.add_request(Request("waiting", PROMPTS[0], GREEDY))
    engine.abort("waiting")
    config_budget = engine.scheduler.max_batch_tokens = 8
    engine.scheduler.max_num_seqs = 8
    engine.add_request(Request("prefill", PROMPTS[5], GREEDY, registered.mix({"all4": 1.0}), registered.paths))
    engine.add_request(Request("decode", PROMPTS[0][:3], GREEDY))
    seen = engine.step()
    assert len(PROMPTS[5]) > config_budget
    engine.abort("prefill")
    for _ in range(4):
        seen += engine.step()
    engine.abort("decode")
    engine.abort("decode")
    engine.abort("unknown")
    seen += engine.step()
    endings = [(output.request_id, output.finish_reason) for output in seen if output.finish_reason]
    assert sorted(endings) == [(name, FinishReason.ABORT) for name in ("decode", "prefill", "waiting")]
    assert not engine.has_work
    engine.check_integrity()
    assert engine.stats().kv_used_blocks == 0
    assert engine.stats().pages["used"] == 0


def test_stop_tokens_end_the_text_and_are_not_part_of_it(engine: Engine, tiny_model: Path) -> None:
    text = reference(base_model(tiny_model), PROMPTS[1])
    stop = text[4]
    expected = text[: text.index(stop)]
    params = replace(GREEDY, stop_token_ids=frozenset({stop}))
    engine.add_request(Request("r", PROMPTS[1], params))
    outputs = drain(engine)["r"]
    assert tokens_of(outputs) == expected
    assert outputs[-1].finish_reason is FinishReason.STOP
    late = replace(params, min_tokens=len(expected) + 2)
    assert len(run(engine, [Request("late", PROMPTS[1], late)])["late"]) >= len(expected) + 2


def test_logprobs_are_those_of_the_model(engine: Engine, tiny_model: Path) -> None:
    params = replace(GREEDY, logprobs=3, temperature=0.7, seed=3, max_tokens=5)
    engine.add_request(Request("r", PROMPTS[2], params))
    outputs = drain(engine)["r"]
    tokens = tokens_of(outputs)
    with torch.inference_mode():
        logits = base_model(tiny_model)(input_ids=torch.tensor([PROMPTS[2] + tokens])).logits[0]
    expected = torch.log_softmax(logits, dim=-1)
    reported = [logprob for output in outputs for logprob in output.logprobs]
    assert len(reported) == 5
    for index, (token, logprob) in enumerate(zip(tokens, reported, strict=True)):
        row = expected[len(PROMPTS[2]) - 1 + index]
        assert logprob.logprob == pytest.approx(float(row[token]), abs=1e-4)
        values, ids = row.topk(3)
        assert [token for token, _ in logprob.top] == ids.tolist()
        assert [value for _, value in logprob.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("request_", "param", "code"),
    [
        (Request("r", (), GREEDY), "prompt", "invalid_value"),
        (Request("r", (512,), GREEDY), "prompt", "invalid_value"),
        (Request("r", (-1,), GREEDY), "prompt", "invalid_value"),
        (Request("r", (5,) * 501, GREEDY), "prompt", "context_length_exceeded"),
        (Request("r", (5,), replace(GREEDY, max_tokens=-1)), "max_tokens", "invalid_value"),
        (Request("r", (5,), replace(GREEDY, logit_bias={512: 1.0})), "logit_bias", "invalid_value"),
        (Request("r", (5,), replace(GREEDY, stop_token_ids=frozenset({-1}))), "stop_token_ids", "invalid_value"),
        (Request("r", (5,), GREEDY, Mix.of([("ab" * 32, 1.0)])), "lora.adapters", "invalid_value"),
    ],
)
def test_refused_requests_leave_no_trace(engine: Engine, request_: Request, param: str, code: str) -> None:
    with pytest.raises(RequestError) as refused:
        engine.add_request(request_)
    assert (refused.value.param, refused.value.code) == (param, code)
    assert not engine.has_work
    assert run(engine, [Request("r", PROMPTS[0], GREEDY)])["r"]


def test_a_mix_larger_than_the_pool_is_refused(tiny_model: Path, registered: Registered, engine: Engine) -> None:
    one = engine.runner.pool.num_bytes // next(iter(engine.runner.pool.num_pages.values()))
    small = Engine.from_config(EngineConfig(str(tiny_model), **{**SMALL, "page_memory": 2 * one}))
    mix = registered.mix({"all4": 1.0, "wide24": 1.0})
    small.add_request(Request("r", PROMPTS[0], GREEDY, mix, registered.paths))
    (output,) = drain(small)["r"]
    assert (output.finish_reason, output.error_code) == (FinishReason.ERROR, "mix_too_large")
    assert output.error_param == "lora.adapters"
    with pytest.raises(RequestError, match="more rank pages") as refused:
        small.add_request(Request("again", PROMPTS[0], GREEDY, mix, registered.paths))
    assert refused.value.code == "mix_too_large"
    assert not small.has_work


def test_an_adapter_that_vanished_fails_only_its_own_request(
    engine: Engine, tiny_model: Path, make_adapter: MakeAdapter, registered: Registered
) -> None:
    gone = make_adapter("gone", seed=99)
    registry = Registered(tiny_model, {"gone": gone})
    (gone / "adapter_model.safetensors").unlink()
    engine.add_request(Request("fine", PROMPTS[0], GREEDY, registered.mix({"all4": 1.0}), registered.paths))
    engine.add_request(Request("gone", PROMPTS[0], GREEDY, registry.mix({"gone": 1.0}), registry.paths))
    outputs = drain(engine)
    (output,) = outputs["gone"]
    assert "is missing" in (output.error or "")
    assert (output.finish_reason, output.error_code) == (FinishReason.ERROR, "adapter_unavailable")
    assert tokens_of(outputs["fine"])


def test_an_id_in_use_is_refused(engine: Engine) -> None:
    engine.add_request(Request("same", PROMPTS[0], GREEDY))
    with pytest.raises(RequestError, match="already running"):
        engine.add_request(Request("same", PROMPTS[1], GREEDY))
    assert set(drain(engine)) == {"same"}


def test_weights_that_overflow_end_only_their_own_request(engine: Engine, registered: Registered) -> None:
    """1e38 times an adapter is infinity times it: that row ends with an error, its neighbours do not notice."""
    alone = run(engine, [Request("alone", PROMPTS[1], GREEDY, registered.mix({"all4": 1.0}), registered.paths)])
    engine.add_request(Request("huge", PROMPTS[1], GREEDY, registered.mix({"all4": 1e38}), registered.paths))
    engine.add_request(Request("fine", PROMPTS[1], GREEDY, registered.mix({"all4": 1.0}), registered.paths))
    outputs = drain(engine)
    assert outputs["huge"][-1].finish_reason is FinishReason.ERROR
    assert "not finite" in (outputs["huge"][-1].error or "")
    assert tokens_of(outputs["fine"]) == alone["alone"]


def test_what_overflowed_is_not_found_as_a_prefix(engine: Engine, registered: Registered) -> None:
    params = replace(GREEDY, max_tokens=2)
    for name, weight in (("fine", 1.0), ("huge", 1e38)):
        request = Request(name, PROMPTS[5], params, registered.mix({"all4": weight}), registered.paths)
        engine.add_request(request)
        drain(engine)
        found, _ = engine.scheduler.blocks.match(PROMPTS[5], request.cache_root)
        assert len(found) == (len(PROMPTS[5]) // 16 if name == "fine" else 0)
        engine.scheduler.blocks.release(found)
