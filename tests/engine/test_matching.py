"""Outputs of one grammar that are advanced side by side."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLExecutor
from tokenizers import Tokenizer

from server.engine.constraint import Constraint, ConstraintKind
from server.engine.grammar import Grammar, GrammarCompiler
from server.engine.masks import MaskThreads
from server.engine.matching import TOGETHER_SECONDS, advance_together, rows_of
from tests.panic import Panic

EOS = 1
VOCABULARY = 512
INTEGER = Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "integer"}')


def test_outputs_of_one_grammar_take_turns_among_its_copies(model: Path, words: Tokenizer) -> None:
    """Which are computed at the same time, and allow the same."""
    grammar = GrammarCompiler(model, VOCABULARY, {EOS}, copies=3).compile(INTEGER)
    matchings = [grammar.start() for _ in range(6)]
    lexers = [matching.lexer for matching in matchings]
    assert len({id(lexer) for lexer in lexers}) == 3
    assert lexers[:3] == lexers[3:]
    for token in words.encode("-120").ids:
        for matching in matchings:
            matching.advance(token)
            assert matching.error is None
            assert (matching.mask == matchings[0].mask).all()
            assert matching.mask.any()


@given(
    st.lists(st.lists(st.integers(0, VOCABULARY - 1) | st.sampled_from(list("-0123456789")), max_size=6), max_size=5)
)
@settings(max_examples=40)
def test_outputs_that_advance_together_are_as_if_each_did_alone(
    whole: Grammar, words: Tokenizer, texts: list[list[int | str]]
) -> None:
    """Also where a token is not allowed, which ends that output only."""
    ids = [[words.token_to_id(one) if isinstance(one, str) else one for one in text] for text in texts]
    together, alone = ([whole.start() for _ in ids] for _ in range(2))
    executor = LLExecutor(2)
    for index in range(max(map(len, ids), default=0)):
        moves = [(one, text[index]) for one, text in zip(together, ids, strict=True) if index < len(text)]
        advance_together(moves, executor)
        for one, text in zip(alone, ids, strict=True):
            if index < len(text):
                one.advance(text[index])
        for one, other in zip(together, alone, strict=True):
            assert one.error == other.error
            assert one.error is not None or (one.mask == other.mask).all()


def test_masks_that_were_computed_together_are_rows_of_one_tensor(whole: Grammar) -> None:
    """In that order and with no other in between; what the next call computes leaves them as they are."""
    own = [whole.start() for _ in range(3)]
    token, begun = int(own[0].allowed()[-1]), list[bool]()
    assert rows_of(own) is None
    advance_together([(one, token) for one in own], LLExecutor(1), lambda: begun.append(rows_of(own) is None))
    rows = rows_of(own)
    assert rows is not None
    assert begun == [True]
    assert (rows.numpy().view(np.uint32) == np.stack([one.mask for one in own])).all()
    assert [rows_of(some) for some in (own[:2], own[::-1], [own[0], own[0], own[2]], [whole.start()])] == [None] * 4
    before = rows.clone()
    own[0].advance(int(own[0].allowed()[-1]))
    assert rows_of(own) is None
    advance_together([(one, int(one.allowed()[0])) for one in own[1:]], LLExecutor(1))
    assert (rows == before).all()
    assert rows_of(own[1:]) is own[1].rows is not rows


@pytest.fixture(scope="module")
def whole(model: Path) -> Grammar:
    return GrammarCompiler(model, VOCABULARY, {EOS}, copies=2).compile(INTEGER)


def test_what_the_library_raises_ends_the_outputs_and_not_the_thread(whole: Grammar) -> None:
    one = whole.start()
    advance_together([(one, 0), (one, 0)], LLExecutor(1))
    assert one.error is not None
    assert one.error.startswith("RuntimeError: ")
    advance_together([(one, 0)], LLExecutor(1))


@pytest.mark.parametrize("kind", [ValueError, Panic])
def test_where_the_library_gets_no_threads_masks_are_computed_one_by_one(
    whole: Grammar, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type[BaseException]
) -> None:
    """As in a container with a limit, which is said once."""

    def refused(num_threads: int) -> LLExecutor:
        raise kind(f"{num_threads} threads: Resource temporarily unavailable (os error 11)")

    monkeypatch.setattr("llguidance.LLExecutor", refused)
    masks, alone, both = MaskThreads(1), whole.start(), [whole.start() for _ in range(2)]
    for _ in range(3):
        token = int(alone.allowed()[-1])
        alone.advance(token)
        for one in both:
            one.seconds = 0.0
        masks.advance([(one, token) for one in both])
        masks.wait(both, 60.0)
        assert [(one.pending, one.error) for one in both] == [(False, None)] * 2
        assert all((one.mask == alone.mask).all() for one in both)
    masks.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_what_was_slow_together_is_timed_alone(whole: Grammar, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call says how long all have taken; it makes none slow by itself, and if it is quick says nothing of each."""
    both, times = [whole.start() for _ in range(2)], iter([0.0, TOGETHER_SECONDS, 1.0, 61.0])
    monkeypatch.setattr("server.engine.matching.time", SimpleNamespace(perf_counter=lambda: next(times)))
    for one in both:
        one.seconds = 0.0
    for quick in (True, False):
        advance_together([(one, int(one.allowed()[-1])) for one in both], LLExecutor(1))
        assert [(one.error, one.quick, one.slow) for one in both] == [(None, quick, False)] * 2
