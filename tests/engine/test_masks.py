"""Masks: bits, their way to the device, and their place in sampling."""

import math
import sys
import threading
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.reference import forbid, greedy
from server.engine.masks import HANDOVER_SECONDS, MaskThreads, shared_out, take, upload_masks
from server.engine.matching import QUICK_SECONDS, SLOW_SECONDS, Matching, advance_together
from server.engine.sampler import sample
from server.engine.sequence import Request, SamplingParams, Sequence
from tests.panic import Panic

WORDS = 3
VOCABULARY = 90
ALLOWED = st.sets(st.integers(0, VOCABULARY - 1), min_size=1)


def mask_of(allowed: set[int]) -> NDArray[np.uint32]:
    mask = np.zeros(WORDS, np.uint32)
    for token in allowed:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask


def matching(allowed: set[int]) -> Matching:
    return Matching(None, mask_of(allowed))  # type: ignore[arg-type]


@given(st.lists(ALLOWED, min_size=1, max_size=5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_a_row_does_not_allow_is_minus_infinity(rows: list[set[int]], dtype: torch.dtype) -> None:
    logits = torch.randn(len(rows), VOCABULARY).to(dtype)
    masks = upload_masks([mask_of(allowed) for allowed in rows], logits.device)
    masked = forbid(logits, masks)
    for row, allowed in enumerate(rows):
        for token in range(VOCABULARY):
            expected = logits[row, token] if token in allowed else torch.tensor(-torch.inf)
            assert torch.equal(masked[row, token], expected.to(dtype))
    assert greedy(logits, masks).tolist() == masked.float().argmax(dim=-1).tolist()


@given(ALLOWED)
def test_the_allowed_tokens_are_listed_in_order(allowed: set[int]) -> None:
    assert matching(allowed).allowed().tolist() == sorted(allowed)


@given(ALLOWED, st.frozensets(st.integers(0, VOCABULARY - 1)))
def test_tokens_are_taken_from_a_mask_unless_nothing_would_be_left(allowed: set[int], taken: frozenset[int]) -> None:
    own = matching(allowed)
    left = Matching(None, own.mask_without(taken)).allowed().tolist()  # type: ignore[arg-type]
    assert left == sorted(allowed - taken or allowed)
    assert own.allowed().tolist() == sorted(allowed), "the mask itself is as it was"


@given(st.lists(st.none() | ALLOWED, min_size=1, max_size=6), st.booleans())
def test_rows_choose_from_what_they_may_and_leave_others_alone(rows: list[set[int] | None], greedy: bool) -> None:
    """The most likely of the allowed tokens, or one drawn among them; rows without a mask as if they were alone."""
    logits = torch.randn(len(rows), VOCABULARY)
    params = SamplingParams(temperature=0.0 if greedy else 1.0, seed=5)
    sequences = [Sequence.of(Request(str(index), (1,), params)) for index in range(len(rows))]
    free, _ = sample(logits.clone(), sequences, frozenset()).read()
    for sequence, allowed in zip(sequences, rows, strict=True):
        sequence.matching = None if allowed is None else matching(allowed)
    tokens, _ = sample(logits.clone(), sequences, frozenset()).read()
    for row, allowed in enumerate(rows):
        if allowed is None:
            assert tokens[row] == free[row]
        else:
            assert tokens[row] in allowed
            if greedy:
                assert tokens[row] == max(allowed, key=lambda token: float(logits[row, token]))


@given(
    st.lists(
        st.tuples(
            st.none() | ALLOWED,
            st.builds(
                SamplingParams,
                temperature=st.sampled_from([0.0, 0.0, 1.0]),
                logprobs=st.sampled_from([None, None, 2]),
                logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-5, 5), max_size=1),
                presence_penalty=st.sampled_from([0.0, 1.0]),
                min_tokens=st.sampled_from([0, 3]),
                seed=st.integers(0, 9),
            ),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 1000),
)
def test_rows_of_all_kinds_choose_beside_each_other_as_alone(
    rows: list[tuple[set[int] | None, SamplingParams, bool]], dtype: torch.dtype, noise: int
) -> None:
    """Masked or not, and with a NaN that counts where its token may come. The most likely tokens are stop tokens."""
    logits = torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(noise)).to(dtype)
    logits[:, 0] = -9.0
    sequences = []
    likely = logits.argmax(dim=-1).tolist()
    for index, (allowed, params, is_nan) in enumerate(rows):
        sequences.append(Sequence.of(Request(str(index), (1,), replace(params, stop_token_ids=frozenset(likely)))))
        sequences[-1].matching = None if allowed is None else matching(allowed)
        logits[index, 0] = torch.nan if is_nan else logits[index, 0]
    together, logprobs = sample(logits.clone(), sequences, frozenset()).read()
    for row, (sequence, (allowed, params, is_nan)) in enumerate(zip(sequences, rows, strict=True)):
        ((token,), (own,)) = sample(logits[row : row + 1].clone(), [sequence], frozenset()).read()
        assert together[row] == token
        assert (logprobs[row] is None) == (own is None) == (params.logprobs is None or token is None)
        assert (token is None) == (is_nan and (allowed is None or 0 in allowed - without(params, likely, allowed)))
        if token is not None and allowed is not None:
            assert token in allowed - without(params, likely, allowed)


def without(params: SamplingParams, stops: list[int], allowed: set[int]) -> set[int]:
    """What may not come yet."""
    return set(stops) if params.min_tokens and allowed - set(stops) else set()


def test_a_pending_mask_is_not_looked_at() -> None:
    sequence = Sequence.of(Request("r", (1,), SamplingParams(temperature=0.0)))
    sequence.matching = matching({3})
    sequence.matching.pending = True
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 50] = 1.0
    assert sample(logits, [sequence], frozenset()).read()[0] == [50]


def test_one_slow_mask_is_forgiven_and_many_are_not() -> None:
    own = matching({1})
    own._note(3 * SLOW_SECONDS)
    assert not own.slow
    for _ in range(3):
        own._note(3 * SLOW_SECONDS)
    assert own.slow
    for _ in range(10):
        own._note(0.0)
    assert not own.slow


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.sampled_from([0.0, 0.002, 0.02])), max_size=30))
def test_quick_outputs_of_a_grammar_go_together_and_others_of_a_lexer(kinds: list[tuple[int, int, float]]) -> None:
    moves = [(of_grammar(f"{name}", f"{name}-{copy}", seconds), 0) for name, copy, seconds in kinds]
    groups, found = shared_out(moves), []
    while (group := take(groups)) is not None:
        found.append([matching for matching, _ in group])
    assert take(groups) is None
    assert sorted(map(id, [one for group in found for one in group])) == sorted(id(one) for one, _ in moves)
    named = [{one.grammar if one.quick else one.lexer for one in group} for group in found]
    assert [len(names) for names in named] == [1] * len({(q, n) for group in found for q, n in map(kind_of, group)})
    assert all(len({one.quick for one in group}) == 1 for group in found)
    sums = [sum(one.seconds for one in group) for group in found]
    assert sums == sorted(sums, reverse=True)


def of_grammar(grammar: str, lexer: str, seconds: float) -> Matching:
    return Matching(None, mask_of({1}), seconds, lexer=sys.intern(lexer), grammar=sys.intern(grammar))  # type: ignore[arg-type]


def kind_of(one: Matching) -> tuple[bool, object]:
    return one.quick, one.grammar if one.quick else one.lexer


def test_a_step_need_not_wait_for_all_of_a_lexer() -> None:
    """What is computed one by one is there one by one."""
    pending: list[list[bool]] = []

    class Watched(Matching):
        def advance(self, _: int) -> None:
            pending.append([one.pending for one, _ in group])

    group = [(Watched(None, mask_of({1}), 0.002, lexer="same"), 0) for _ in range(3)]  # type: ignore[arg-type]
    for one, _ in group:
        one.pending = True
    MaskThreads(1)._run(deque([group]))
    assert pending == [[True, True, True], [False, True, True], [False, False, True]]


def test_outputs_without_a_lexer_of_their_own_are_apart() -> None:
    assert [len(group) for group in shared_out([(matching({1}), token) for token in range(7)])] == [1] * 7


class Panicking:
    """A matcher, and an executor."""

    def consume_token(self, token: int) -> bool:
        raise Panic(f"at {token}")

    def consume_token_par(self, moves: list[tuple[object, int]]) -> list[bool]:
        raise Panic(f"at {moves[0][1]}")


def test_a_panic_ends_its_output_and_leaves_no_other_waiting() -> None:
    masks = MaskThreads(1)
    moves = [(Matching(Panicking(), mask_of({1}), 2 * QUICK_SECONDS), token) for token in range(3)]  # type: ignore[arg-type]
    masks.advance(moves)
    masks.wait([one for one, _ in moves], 60.0)
    masks.close()
    assert [(one.pending, one.error) for one, _ in moves] == [(False, f"Panic: at {token}") for token in range(3)]


def test_a_panic_in_a_common_call_ends_all_of_it() -> None:
    moves = [(matching({1}), token) for token in range(2)]
    advance_together(moves, Panicking())  # type: ignore[arg-type]
    assert [one.error for one, _ in moves] == ["Panic: at 0"] * 2


class Failing:
    """A matcher that takes every token and has no mask then, and an executor of such."""

    def consume_token_par(self, moves: list[tuple[object, int]]) -> list[bool]:
        return [True] * len(moves)

    def unsafe_compute_mask_ptr(self, *_: object) -> None: ...

    def is_error(self) -> bool:
        return True

    def get_error(self) -> str:
        return "too many items"


def test_a_mask_that_fails_in_a_common_call_is_an_error() -> None:
    one = Matching(Failing(), mask_of({1}))  # type: ignore[arg-type]
    advance_together([(one, 0)], Failing())  # type: ignore[arg-type]
    assert one.error == "too many items"


class Held(Panicking):
    """A matcher that computes until it is told to stop."""

    def __init__(self) -> None:
        self.told = threading.Event()

    def consume_token(self, token: int) -> bool:
        self.told.wait(60.0)
        return super().consume_token(token)


def test_what_is_slow_delays_nothing_else() -> None:
    masks, held = MaskThreads(1), Held()
    slow = Matching(held, mask_of({1}), 2 * SLOW_SECONDS)  # type: ignore[arg-type]
    other = Matching(Panicking(), mask_of({1}))  # type: ignore[arg-type]
    masks.advance([(slow, 0), (other, 0)])
    masks.wait([other], 30.0)
    assert (slow.pending, other.pending) == (True, False)
    held.told.set()
    masks.wait([slow], 60.0)
    masks.close()
    assert not slow.pending


def test_the_engine_waits_for_the_tokens_of_a_common_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not for threads that may be busy with something slow."""
    masks, waits = MaskThreads(1), list[float | None]()
    wait = masks._begun.wait

    def waited(seconds: float | None = None) -> bool:
        waits.append(seconds)
        return wait(60.0)

    monkeypatch.setattr(masks._begun, "wait", waited)
    for own in (
        [Matching(Panicking(), mask_of({1}), seconds) for seconds in (2 * SLOW_SECONDS, 2 * QUICK_SECONDS, 0.0)],  # type: ignore[arg-type]
        [Matching(Panicking(), mask_of({1}), grammar="same") for _ in range(2)],  # type: ignore[arg-type]
    ):
        masks.advance([(one, 0) for one in own])
        masks.wait(own, 60.0)
    masks.close()
    assert waits == [HANDOVER_SECONDS]


@pytest.mark.parametrize("case", ["threads are busy", "no threads of the library"])
def test_the_engine_does_not_wait_for_a_common_call_that_does_not_begin_at_once(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks, waits = MaskThreads(1), list[float | None]()
    monkeypatch.setattr(masks._begun, "wait", waits.append)
    masks._alone = case != "threads are busy"
    before = [] if masks._alone else [matching_of(Panicking(), 2 * QUICK_SECONDS)]
    own = [*before, *(matching_of(Panicking()) for _ in range(2))]
    masks.advance([(one, 0) for one in own])
    masks.wait(own, 60.0)
    masks.close()
    assert not any(one.pending for one in own)
    assert waits == []


def matching_of(matcher: Panicking, seconds: float = 0.0) -> Matching:
    """Of one grammar, all of them."""
    return Matching(matcher, mask_of({1}), seconds, grammar=Panicking)  # type: ignore[arg-type]


def test_an_output_that_becomes_slow_at_once_takes_its_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the engine has handed the slow ones over."""
    taken: list[int] = []

    class Slowing(Matching):
        def advance(self, token: int) -> None:
            taken.append(token)
            self.seconds = 2 * SLOW_SECONDS

    masks, own = MaskThreads(1), Slowing(None, mask_of({1}))  # type: ignore[arg-type]
    monkeypatch.setattr(masks._lanes[0], "submit", lambda run, groups: run(groups))
    masks.advance([(own, 7)])
    masks.wait([own], 60.0)
    masks.close()
    assert taken == [7]


class World:
    """A clock that moves when a thread waits, and what happens at some of its seconds. Who waits is told of the last
    masks only."""

    def __init__(self, matchings: list[Matching], done: dict[float, int], runs_until: float) -> None:
        self.now = 0.0
        self.masks = MaskThreads(1, lambda: self.now)
        self.masks._news = self  # type: ignore[assignment]
        self._matchings, self._done, self._runs_until = matchings, done, runs_until

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def running(self) -> bool:
        return self.now < self._runs_until

    def wait(self, seconds: float) -> None:
        last = max(self._done, default=math.inf)
        self.now += min(seconds, last - self.now) if last > self.now else seconds
        for at, count in self._done.items():
            if at <= self.now:
                for one in self._matchings[:count]:
                    one.pending = False

    def outwait(self, rows: int, step_seconds: float) -> int:
        for one in self._matchings:
            one.pending = True
        self.masks.outwait(self._matchings, rows, self.running, step_seconds)
        return sum(one.pending for one in self._matchings)


@pytest.mark.parametrize(
    ("done", "runs_until", "given_up", "ends", "idled"),
    [
        ({3.0: 4}, 5.0, 0, 3.0, 0.0),  # while the device runs the model nothing is lost
        ({5.5: 4}, 5.0, 0, 5.5, 0.5),  # four of eight rows wait: half a step is worth it
        ({4.0: 3, 6.0: 4}, 5.0, 0, 6.0, 1.0),  # one row: an eighth of a step
        ({4.0: 3, 7.0: 4}, 5.0, 1, 6.0, 1.0),
        ({4.0: 3, 5.5: 3, 7.0: 4}, 0.0, 1, 4.0, 4.0),  # three came within what four are worth, then it was enough
        ({0.5: 2, 1.5: 3, 7.0: 4}, 0.0, 1, 1.5, 1.5),  # the fewer are missing, the sooner: the last is worth a second
        ({0.5: 3, 7.0: 4}, 0.0, 1, 1.0, 1.0),
        ({}, 5.0, 4, 9.0, 4.0),
        ({}, 0.0, 4, 4.0, 4.0),
    ],
)
def test_masks_are_waited_for_while_that_is_cheaper_than_to_miss_a_step(
    done: dict[float, int], runs_until: float, given_up: int, ends: float, idled: float
) -> None:
    """Of a step of eight seconds and eight rows, four of which need a mask."""
    world = World([matching({1}) for _ in range(4)], done, runs_until)
    assert world.outwait(rows=8, step_seconds=8.0) == given_up
    assert world.now == pytest.approx(ends, abs=1e-3)
    assert world.masks.idled == pytest.approx(idled, abs=1e-3)
