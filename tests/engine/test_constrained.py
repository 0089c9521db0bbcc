"""Outputs under a constraint: always of its language, whatever else is asked for and whatever shares the batch."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from server.engine import matching
from server.engine.config import EngineConfig
from server.engine.constraint import Constraint, ConstraintKind
from server.engine.engine import Engine
from server.engine.matching import Matching, Moves
from server.engine.plan import Chunk, LayerRun, Plan
from server.engine.runner import Launched
from server.engine.sampler import Sampled
from server.engine.sequence import FinishReason, Request, TokenLogprobs
from tests.engine.constrained_requests import (
    ALL,
    BLOCK_BYTES,
    CHOICE,
    CHOICES,
    GREEDY,
    OBJECT,
    REGEX,
    SCHEMA,
    LazyMasks,
    batch,
    compile_all,
    constrained,
    matches,
    text_of,
)
from tests.engine.delayed_steps import CPU, DelayedSteps
from tests.engine.tiny_engine import PROMPTS, Registered, drain, outputs_of, texts, tokens_of

Make = Callable[..., Engine]


@pytest.fixture
def make(model: Path) -> Make:
    """`make(ahead, **settings)`: an engine whose host is one step ahead or not."""

    def engine(ahead: bool = False, **options: object) -> Engine:
        made = Engine.from_config(EngineConfig(str(model), **{**CPU, **options}))  # type: ignore[arg-type]
        if ahead:
            made.runner.steps = DelayedSteps(made.runner, made.config.block_size)
        return made

    return engine


@pytest.mark.parametrize("ahead", [False, True])
def test_every_output_is_of_its_language(make: Make, words: Tokenizer, ahead: bool) -> None:
    engine = make(ahead, mask_threads=3)
    outputs = outputs_of(engine, batch())
    for request in batch():
        own, constraint = outputs[request.id], request.params.constraint
        if constraint is not None:
            assert own[-1].finish_reason is FinishReason.STOP, request.id
            assert matches(constraint, text_of(own, words)), request.id
        assert len([output for output in own if output.logprobs]) == (
            len(texts(outputs)[request.id]) * ("biased" in request.id)
        )
    assert engine.arrivals.grammars is not None
    assert len(engine.arrivals.grammars) == len(ALL), "one compilation for equal constraints"


def test_constrained_and_free_rows_give_what_each_gives_alone(make: Make) -> None:
    together = texts(outputs_of(make(), batch()))
    ahead = texts(outputs_of(make(True), batch()))
    few_blocks = make(True, kv_memory=24 * BLOCK_BYTES, max_model_len=256, max_num_seqs=12)
    compile_all(few_blocks, batch())
    few_blocks.masks = LazyMasks(0)
    preempted = texts(outputs_of(few_blocks, batch()))
    alone = make()
    for request in batch():
        assert texts(outputs_of(alone, [request]))[request.id] == together[request.id]
    assert ahead == together
    assert preempted == together
    assert few_blocks.scheduler.preemptions > 0


def test_where_the_system_has_no_threads_outputs_are_the_same(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Until it has some again; what is missing is said once."""
    engine, usual = make(mask_threads=3), texts(outputs_of(make(), batch()))
    compile_all(engine, batch())
    before = threading.stack_size(1 << 50)  # no thread starts with that
    try:
        assert texts(outputs_of(engine, batch())) == usual
    finally:
        threading.stack_size(before)
    assert [record.message for record in caplog.records] == ["masks hold up the engine's steps: can't start new thread"]
    assert texts(outputs_of(engine, batch())) == usual
    engine.check_integrity()


def test_max_tokens_cuts(make: Make, words: Tokenizer) -> None:
    outputs = outputs_of(make(), [Request("r", PROMPTS[0], replace(GREEDY, constraint=SCHEMA, max_tokens=4))])["r"]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert text_of(outputs, words).startswith("{")


@pytest.mark.parametrize("change", [{"ignore_eos": True}, {"min_tokens": 100}, {"logit_bias": {1: -100.0}}], ids=str)
def test_a_complete_text_ends_whatever_is_asked_for(make: Make, words: Tokenizer, change: dict[str, object]) -> None:
    params = replace(GREEDY, constraint=CHOICE, **change)  # type: ignore[arg-type]
    outputs = outputs_of(make(), [Request("r", PROMPTS[0], params)])["r"]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert text_of(outputs, words) in CHOICES


def test_min_tokens_keeps_a_text_going_where_it_can(make: Make) -> None:
    constraint = Constraint(ConstraintKind.REGEX, "a{1,30}")
    params = replace(GREEDY, constraint=constraint, logit_bias={1: 100.0})
    for least in (0, 5):
        requests = [Request(f"r{row}", PROMPTS[1], replace(params, min_tokens=least)) for row in range(3)]
        for some in (requests[:1], requests):  # also where masks of several rows are computed together
            outputs = outputs_of(make(ahead=bool(least)), some)
            assert [sum(len(one.tokens) for one in own) for own in outputs.values()] == [max(1, least)] * len(some)


def test_a_stop_token_of_the_request_ends_it(make: Make, words: Tokenizer) -> None:
    brace = words.encode("{").ids[0]
    params = replace(GREEDY, constraint=OBJECT, stop_token_ids=frozenset({brace}), logit_bias={brace: 100.0})
    outputs = outputs_of(make(), [Request("r", PROMPTS[0], params)])["r"]
    assert [output.finish_reason for output in outputs] == [FinishReason.STOP]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_abort_frees_the_matcher(make: Make, ahead: bool, steps: int) -> None:
    engine = make(ahead)
    engine.add_request(Request("r", PROMPTS[0], replace(GREEDY, constraint=SCHEMA)))
    (sequence,) = engine._sequences.values()
    for _ in range(steps):
        engine.step()
    engine.abort("r")
    outputs = drain(engine)["r"]
    assert outputs[-1].finish_reason is FinishReason.ABORT
    assert sequence.matching is None
    assert engine.arrivals.grammars is not None
    assert not engine.arrivals.grammars._users


@pytest.mark.parametrize("ahead", [False, True])
def test_slow_masks_change_nothing(make: Make, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow ones are never launched ahead; their rows wait for them, others do not."""
    expected = texts(outputs_of(make(), batch()))
    monkeypatch.setattr(matching, "SLOW_SECONDS", -1.0)
    engine = make(ahead, kv_memory=18 * BLOCK_BYTES, max_model_len=256, max_num_seqs=12)
    compile_all(engine, batch())
    engine.masks = LazyMasks(3)
    waited = 0
    advance = engine.scheduler.advance

    def watched(chunk: Chunk) -> None:
        nonlocal waited
        own = chunk.sequence.matching
        assert own is None or (own.slow and not own.pending and not chunk.sequence.num_pending)
        waited += own is not None
        advance(chunk)

    monkeypatch.setattr(engine.scheduler, "advance", watched)
    assert texts(outputs_of(engine, batch())) == expected
    assert waited > 100
    assert engine.scheduler.preemptions > 0


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("patience", [0, 1, 2, 5])
def test_late_masks_change_nothing(make: Make, ahead: bool, patience: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose mask does not come in time gives up its token, and gets the same one later; free rows go on."""
    expected = texts(outputs_of(make(), batch()))
    engine = make(ahead, kv_memory=24 * BLOCK_BYTES, max_model_len=256, max_num_seqs=12)
    engine.masks = LazyMasks(patience)
    late = 0
    retract = engine.scheduler.retract

    def watched(chunk: Chunk) -> None:
        nonlocal late
        late += 1
        retract(chunk)

    monkeypatch.setattr(engine.scheduler, "retract", watched)
    assert texts(outputs_of(engine, batch())) == expected
    assert bool(late) == bool(patience)


@pytest.mark.parametrize("idle", [False, True])
def test_masks_are_begun_before_the_next_launch_where_the_device_waits_for_it(
    make: Make, idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once in either case, as the tokens are read, which changes no output."""
    engine, order = make(True), list[str]()
    advance, launch, read = engine.masks.advance, engine.runner.launch, Sampled.read

    def advanced(moves: Moves) -> None:
        order.append("masks")
        advance(moves)

    def launched(chunks: list[Chunk], layers: LayerRun | None = None) -> Launched:
        order.append("launch")
        return launch(chunks, layers)

    def counted(sampled: Sampled) -> tuple[list[int | None], list[TokenLogprobs | None]]:
        order.append("read")
        return read(sampled)

    monkeypatch.setattr(Launched, "ended", idle)
    monkeypatch.setattr(Sampled, "read", counted)
    monkeypatch.setattr(engine.masks, "advance", advanced)
    monkeypatch.setattr(engine.runner, "launch", launched)
    request = Request("one", PROMPTS[0], constrained(GREEDY, SCHEMA))
    found = texts(outputs_of(engine, [request]))
    steps = order.count("launch")
    assert order.count("read") == steps
    order = [event for event in order if event != "read"]
    begin = ["launch", "masks", "launch", "masks"] if idle else ["launch", "launch", "masks", "launch"]
    assert order[:4] == begin
    assert order.count("masks") == steps
    assert found == texts(outputs_of(make(False), [request]))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_mask_that_fails_ends_its_request_only(make: Make, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does when a grammar turns out to be too complex behind some tokens."""
    engine = make(ahead)
    free = Request("free", PROMPTS[1], GREEDY)
    constrained_too = Request("r", PROMPTS[0], constrained(GREEDY, SCHEMA))
    alone = texts(outputs_of(engine, [free, constrained_too]))["free"]
    advance = Matching.advance

    def failing(own: Matching, token: int) -> None:
        advance(own, token)
        own.error = "too many items"

    monkeypatch.setattr(Matching, "advance", failing)
    outputs = outputs_of(engine, [constrained_too, free])
    last = outputs["r"][-1]
    assert (last.finish_reason, last.error_code, last.error_param) == (
        FinishReason.ERROR,
        "invalid_constraint",
        "response_format",
    )
    assert last.error == "response_format: at token 2 it is too complex, or nothing can follow"
    assert tokens_of(outputs["free"]) == alone


def test_masks_cover_vocabularies_larger_than_the_tokenizers(make: Make, words: Tokenizer) -> None:
    """No token that the tokenizer does not know is ever chosen, however likely."""
    bias = dict.fromkeys(range(words.get_vocab_size(), 512), 100.0)
    engine = make()
    outputs = outputs_of(engine, [Request("r", PROMPTS[0], replace(GREEDY, constraint=REGEX, logit_bias=bias))])["r"]
    assert matches(REGEX, text_of(outputs, words))


def test_every_adapter_mix(make: Make, words: Tokenizer, tiny_model: Path, adapters: dict[str, Path]) -> None:
    registered = Registered(tiny_model, adapters)
    mixes = [{"all4": 1.0}, {"qv16": 0.7, "wide24": -0.3}, {"rslora8": 1.0, "all4": 0.5, "qv16": 0.2}]
    requests = [
        Request(str(index), PROMPTS[index], constrained(GREEDY, SCHEMA), registered.mix(mix), registered.paths)
        for index, mix in enumerate(mixes)
    ]
    outputs = outputs_of(make(True), requests)
    for request in requests:
        assert matches(SCHEMA, text_of(outputs[request.id], words))
    assert len(set(texts(outputs).values())) == len(mixes)


@pytest.mark.parametrize("late", ["slow", "behind"])
def test_a_row_waits_in_the_queue_for_a_mask_that_is_late(make: Make, late: str) -> None:
    """Preempted with its mask under way, it does not begin anew before that is there; others do."""
    engine = make()
    engine.masks = LazyMasks(0)
    for name, params in (("r", constrained(GREEDY, SCHEMA)), ("free", GREEDY)):
        engine.add_request(Request(name, PROMPTS[0], params))
    while len(engine.scheduler.running) < 2:
        engine.step()
    sequence = engine._sequences["r"]
    own = sequence.matching
    assert own is not None
    engine.scheduler._preempt(sequence, Plan(1))
    own.pending = True
    own.behind, own.seconds = late == "behind", 1.0 if late == "slow" else 0.0
    assert [chunk.sequence.request.id for chunk in engine.scheduler.schedule().chunks] == ["free"]
    own.pending = False
    assert "r" in [chunk.sequence.request.id for chunk in engine.scheduler.schedule().chunks]
