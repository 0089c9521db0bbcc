"""Mixture-of-LoRAs through the whole engine, against its formulas over the `transformers` model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.engine.config import EngineConfig, RequestError
from server.engine.engine import Engine
from server.engine.plan import Chunk, LayerRun, Plan
from server.engine.runner import Launched
from server.engine.sequence import FinishReason, Request
from tests.engine.plain_routing import Made, Plain, make_prompt_router, routed
from tests.engine.routed_world import (
    SCORED,
    Asked,
    assert_equals_plain,
    assert_mixed_traffic_equals_plain,
    engine,
    outputs_with_aborts,
    routed_engine,
)
from tests.engine.tiny_engine import GREEDY, PROMPTS, SMALL, Registered, drain, tokens_of

__all__ = ["engine"]


@pytest.fixture
def moa(tiny_model: Path, registered: Registered, tmp_path: Path) -> Made:
    return make_prompt_router(tmp_path / "moa", tiny_model, registered, tuple(sorted(registered.weights)))


@pytest.fixture
def plain(tiny_model: Path, registered: Registered, moa: Made) -> Plain:
    return Plain(tiny_model, registered, moa)


FORMS: list[dict[str, Any]] = [
    {},
    {"decision": "last"},
    {"pooling": "last", "norm": "rms"},
    {"pooling": "max", "decision": "last", "depth": 2},
    {"pooling": "attention", "depth": 1},
    {"activation": "rational", "norm": "rms", "null": True},
    {"top_k": 2, "norm": "rms"},
    {"top_k": 3, "null": True, "decision": "last"},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_one_request_equals_the_formulas(
    tiny_model: Path, registered: Registered, tmp_path: Path, form: dict[str, Any]
) -> None:
    made = make_prompt_router(tmp_path / "r", tiny_model, registered, tuple(sorted(registered.weights)), **form)
    plain, engine = Plain(tiny_model, registered, made), routed_engine(tiny_model)
    for number in (0, 2, 5):
        engine.add_request(routed(str(number), PROMPTS[number], registered, made.use(), SCORED))
        assert_equals_plain(drain(engine)[str(number)], plain, PROMPTS[number], made.use())


def test_prompts_are_told_apart(plain: Plain, moa: Made) -> None:
    """Otherwise the other tests would show little."""
    assert len({str(plain.decide(prompt, moa.use())[0]) for prompt in PROMPTS}) > 1


def test_a_prompt_of_one_token(engine: Engine, plain: Plain, moa: Made, registered: Registered) -> None:
    engine.add_request(routed("r", (7,), registered, moa.use(), SCORED))
    assert_equals_plain(drain(engine)["r"], plain, (7,), moa.use())


def test_masked_adapters_are_never_chosen(engine: Engine, plain: Plain, moa: Made, registered: Registered) -> None:
    for number, only in enumerate((moa.names[:1], moa.names[1:3], moa.names[2:])):
        use = moa.use(only=only)
        engine.add_request(routed(str(number), PROMPTS[3], registered, use, SCORED))
        outputs = drain(engine)[str(number)]
        assert_equals_plain(outputs, plain, PROMPTS[3], use)
        told = outputs[0].decided
        assert told is not None
        assert {moa.names[row] for layer in told.chosen for row in layer} <= set(only)


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_batch_tokens": 8, "max_num_seqs": 8}, {"kv_memory": 17 * 3072, "block_size": 4, "max_model_len": 64}],
)
def test_all_kinds_of_rows_share_batches_and_survive_chunks_and_preemption(
    tiny_model: Path, registered: Registered, moa: Made, plain: Plain, tmp_path: Path, settings: dict[str, Any]
) -> None:
    other = make_prompt_router(tmp_path / "other", tiny_model, registered, moa.names[1:], 8, pooling="attention")
    both = {"moa": (plain, moa), "other": (Plain(tiny_model, registered, other), other)}
    asked: dict[str, Asked] = {}
    for number, prompt in enumerate(PROMPTS[1:5]):
        for which, (_, own) in both.items():
            asked[f"{which}-{number}"] = (which, prompt, own.use(only=own.names[number % 2 :]))
    assert_mixed_traffic_equals_plain(tiny_model, registered, both, asked, tmp_path / "gates", settings, seed=1)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_preemption_while_the_prompt_is_read_changes_nothing(
    tiny_model: Path, plain: Plain, moa: Made, registered: Registered, steps: int
) -> None:
    """What was read before is forgotten, or it would count twice."""
    engine = routed_engine(tiny_model, max_batch_tokens=16, max_num_seqs=8)  # four chunks
    registered.load(engine)
    engine.add_request(routed("r", PROMPTS[5], registered, moa.use(), SCORED))
    while not engine.scheduler.running:
        engine.step()
    for _ in range(steps):
        engine.step()
    (sequence,) = engine.scheduler.running
    assert sequence.undecided
    engine.scheduler._preempt(sequence, Plan(0))
    engine.check_integrity()
    assert_equals_plain(drain(engine)["r"], plain, PROMPTS[5], moa.use())


def test_the_same_prompt_never_pays_twice(engine: Engine, plain: Plain, moa: Made, registered: Registered) -> None:
    """The decision is remembered, so that its prefix is found at once; other tenants learn nothing of it."""
    prompt = PROMPTS[5]
    seen = []
    for number, (use, key) in enumerate(
        (
            (moa.use(), b"a"),
            (moa.use(), b"a"),
            (moa.use(2), b"a"),
            (moa.use(only=moa.names[1:]), b"a"),
            (moa.use(), b"b"),
        )
    ):
        engine.add_request(routed(str(number), prompt, registered, use, SCORED, key))
        outputs = drain(engine)[str(number)]
        assert_equals_plain(outputs, plain, prompt, use)
        assert outputs[0].decided is not None
        seen.append((outputs[0].decided.cached, outputs[0].decided.seconds == 0, outputs[0].cached_tokens > 0))
    assert seen[:3] == [(False, False, False), (True, True, True), (False, False, False)]
    assert seen[4] == (False, False, False)
    assert engine.deciding.num_remembered == 4


def test_equal_prompts_at_once_are_read_once(
    engine: Engine, plain: Plain, moa: Made, registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    launch = engine.runner.launch

    def counted(chunks: list[Chunk], layers: LayerRun | None) -> Launched:
        rows.append(sum(chunk.num_tokens for chunk in chunks))
        return launch(chunks, layers)

    monkeypatch.setattr(engine.runner, "launch", counted)
    for number in range(4):
        engine.add_request(routed(str(number), PROMPTS[4], registered, moa.use(), replace(SCORED, seed=number)))
    outputs = drain(engine)
    for number in range(4):
        assert_equals_plain(outputs[str(number)], plain, PROMPTS[4], moa.use())
    decided = [outputs[str(number)][0].decided for number in range(4)]
    assert [told is not None and told.cached for told in decided] == [False, True, True, True]
    assert sum(rows) == len(PROMPTS[4]) * 5 + 4 * (SCORED.max_tokens - 1), "one reading beside four prompts"


def test_reading_leaves_the_base_models_prefix_behind(
    engine: Engine, moa: Made, registered: Registered, tiny_model: Path
) -> None:
    engine.add_request(routed("r", PROMPTS[5], registered, moa.use(), SCORED))
    drain(engine)
    engine.add_request(Request("base", PROMPTS[5], SCORED))
    outputs = drain(engine)["base"]
    assert outputs[0].cached_tokens == (len(PROMPTS[5]) - 1) // 16 * 16
    alone = routed_engine(tiny_model)
    alone.add_request(Request("base", PROMPTS[5], SCORED))
    assert tokens_of(outputs) == tokens_of(drain(alone)["base"])


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_prompt_that_is_all_in_the_prefix_cache(
    engine: Engine, registered: Registered, tiny_model: Path, tmp_path: Path, pooling: str
) -> None:
    """Where the last token is all that a router needs, the base model's prefix is used; else all is read anew."""
    made = make_prompt_router(
        tmp_path / "r", tiny_model, registered, tuple(sorted(registered.weights)), pooling=pooling
    )
    prompt = PROMPTS[4][:33]
    engine.add_request(Request("base", prompt, SCORED))
    drain(engine)
    hits = engine.scheduler.blocks.hits
    engine.add_request(routed("r", prompt, registered, made.use(), SCORED))
    assert_equals_plain(drain(engine)["r"], Plain(tiny_model, registered, made), prompt, made.use())
    assert engine.scheduler.blocks.hits - hits == (32 if pooling == "last" else 0)


@pytest.mark.parametrize("steps", range(7))
def test_whoever_waits_takes_over_when_the_first_one_is_aborted(
    tiny_model: Path, plain: Plain, moa: Made, registered: Registered, steps: int
) -> None:
    engine = routed_engine(tiny_model, max_batch_tokens=16, max_num_seqs=8)
    registered.load(engine)
    requests = [routed(each, PROMPTS[5], registered, moa.use(), SCORED) for each in ("first", "second", "third")]
    outputs = outputs_with_aborts(engine, requests, steps, ["second", "first"])
    assert outputs["first"][-1].finish_reason is outputs["second"][-1].finish_reason is FinishReason.ABORT
    assert_equals_plain(outputs["third"], plain, PROMPTS[5], moa.use())
    assert not engine.deciding.followers
    assert engine.deciding.num_remembered == 1


def test_what_is_not_chosen_needs_no_pages(tiny_model: Path, registered: Registered, moa: Made, plain: Plain) -> None:
    """Fewer pages than all adapters of the router take; the chosen one fits."""
    whole = routed_engine(tiny_model)
    per_page = whole.runner.pool.num_bytes / sum(whole.runner.pool.num_pages.values())
    engine = routed_engine(tiny_model, page_memory=int(per_page * 13))
    assert not engine.runner.pool.num_pages["qkv"] > 4
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(routed(str(number), prompt, registered, moa.use(), SCORED))
        assert_equals_plain(drain(engine)[str(number)], plain, prompt, moa.use())


def test_logprobs_of_a_routed_prompt_are_those_of_the_chosen_adapter(
    engine: Engine, moa: Made, registered: Registered
) -> None:
    params = replace(SCORED, prompt_logprobs=0)
    engine.add_request(routed("r", PROMPTS[3], registered, moa.use(), params))
    outputs = drain(engine)["r"]
    told = outputs[-1]
    assert sum(len(output.prompt_logprobs) for output in outputs) == len(PROMPTS[3]) - 1
    decided = next(output.decided for output in outputs if output.decided is not None)
    (row,) = decided.chosen[0]
    explicit = Request("e", PROMPTS[3], params, registered.mix({moa.names[row]: 1.0}), registered.paths)
    engine.add_request(explicit)
    expected = drain(engine)["e"]
    assert told.finish_reason is FinishReason.LENGTH
    found = [each.logprob for output in outputs for each in output.prompt_logprobs]
    assert found == pytest.approx([each.logprob for output in expected for each in output.prompt_logprobs], abs=1e-4)


def test_routers_that_cannot_be_read_end_their_requests_alone(
    engine: Engine, moa: Made, registered: Registered
) -> None:
    lost = replace(moa.use(), digest="lost", path=str(moa.folder / "nowhere"))
    fewer = replace(moa.use(), digest="fewer", rows=moa.use().rows[:2])
    engine.add_request(routed("lost", PROMPTS[0], registered, lost, GREEDY))
    engine.add_request(routed("also", PROMPTS[0], registered, lost, GREEDY))
    engine.add_request(routed("fewer", PROMPTS[0], registered, fewer, GREEDY))
    engine.add_request(Request("base", PROMPTS[0], GREEDY))
    outputs = drain(engine)
    assert len(tokens_of(outputs["base"])) == GREEDY.max_tokens
    for name, reason in (("lost", "router.json"), ("also", "router.json"), ("fewer", "4 adapters, expected 2")):
        (output,) = outputs[name]
        assert (output.finish_reason, output.error_code) == (FinishReason.ERROR, "router_unavailable")
        assert reason in (output.error or "")


def test_adapters_that_cannot_be_had_end_the_request(engine: Engine, moa: Made, registered: Registered) -> None:
    for number in range(2):
        request = routed(str(number), PROMPTS[0], registered, moa.use(), GREEDY)
        engine.add_request(replace(request, paths=dict.fromkeys(request.paths, "/nowhere")))
    for number, outputs in drain(engine).items():
        assert outputs[0].error_code == "adapter_unavailable", number


def test_an_engine_refuses_what_it_cannot_route(
    tiny_model: Path, engine: Engine, moa: Made, registered: Registered
) -> None:
    request = routed("r", PROMPTS[0], registered, moa.use(), GREEDY)
    without = Engine.from_config(EngineConfig(str(tiny_model), **SMALL))
    with pytest.raises(RequestError, match="no prompt-level routers"):
        without.add_request(request)
    for bad in (
        replace(request, mix=registered.mix({"all4": 1.0})),
        replace(request, mix=registered.mix(dict.fromkeys(moa.names, 0.5))),
        replace(request, prompt_router=moa.use(only=())),
        replace(request, prompt_router=replace(moa.use(), top_k=0)),
    ):
        with pytest.raises(RequestError, match="the router's adapters"):
            engine.add_request(bad)
    assert not engine.has_work
    engine.check_integrity()
