"""One output and its grammar: what has been matched so far, and which tokens may come next."""

import time
from collections.abc import Callable
from collections.abc import Sequence as ReadOnlyList
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

Moves = ReadOnlyList[tuple["Matching", int]]
"""Outputs and their newest tokens."""

SLOW_SECONDS = 0.005
"""CPU seconds from which masks are slow, on average. Over 128,000 tokens those of a JSON schema take 20 microseconds at
the median and 110 on average, since some take 2 milliseconds, as near the end of a bounded string; those of nested
counted repetitions take 1; what was made to be slow takes up to half a second.
"""
QUICK_SECONDS = 0.0005
"""Up to which masks of one grammar are computed in one call. Those of JSON schemas take 0.15 milliseconds on average
where strings are bounded and 0.03 where they are not."""
TOGETHER_SECONDS = 0.01
"""From which a call says that its masks are no longer quick. Of 64 rows of a JSON schema one took 4 milliseconds, the
slowest of hundreds 8; while a call only told what each mask might have taken, outputs were computed now in one way and
now in the other, and a decode step of 5.5 ms took 6.7 instead of 5.6."""
NEWEST_SHARE = 0.25
"""Of the average over the masks of one output."""


class Matching:
    """Masks for the tokens of one output, each computed while a step runs.

    mask: uint32[ceil(vocabulary / 32)], bit t % 32 of word t // 32 is set where token t may come next; until then the
    same array. `pending`: the last token has been handed over, its mask is not there yet, and nothing else here may be
    touched. `rows`: int32[n, words] of which it is row `row`, if it was computed with others. `behind`: a step has
    waited for the mask in vain. `seconds`: CPU time of its masks, the newest counting most. `error`: why there are no
    more masks. `lexer`: masks with the same one are computed one after another, in however many threads. `grammar`:
    what the output must match.
    """

    def __init__(
        self,
        matcher: "LLMatcher",
        mask: NDArray[np.uint32],
        seconds: float = 0.0,
        *,
        lexer: object = None,
        grammar: object = None,
    ) -> None:
        self.mask = mask
        self.seconds = seconds
        # Not itself: what the matcher holds, up to 100 MB, would stay until the garbage collector looks for cycles.
        self.lexer = object() if lexer is None else lexer
        self.grammar = object() if grammar is None else grammar
        self.pending = False
        self.behind = False
        self.error: str | None = None
        self.rows: Tensor | None = None
        self.row = 0
        self._matcher = matcher
        self._own = mask
        self._place = mask.ctypes.data, mask.nbytes

    @property
    def slow(self) -> bool:
        """Whether no step should count on a mask before it is there."""
        return self.seconds > SLOW_SECONDS

    @property
    def quick(self) -> bool:
        """Whether others of its grammar may be kept waiting for its masks."""
        return self.seconds <= QUICK_SECONDS

    @property
    def ready(self) -> bool:
        """Whether a step may count on the mask: it is there, or it will be when the model has been run."""
        return not (self.pending and (self.slow or self.behind))

    def advance(self, token: int) -> None:
        """The mask behind `token`, which the mask before must have allowed. Never raises; see `error`."""
        started = time.thread_time()
        try:
            if self.error is None:
                self._took(self._matcher.consume_token(token))
            if self.error is None:
                self._fill()
        except BaseException as error:  # whatever the library raises, also a panic, ends this output, not the thread
            self.error = f"{type(error).__name__}: {error}"
        self._note(time.thread_time() - started)

    def fill(self) -> None:
        """The mask before any token. As `advance`."""
        started = time.thread_time()
        self._fill()
        self._note(time.thread_time() - started)

    def allowed(self) -> NDArray[np.int64]:
        """int64[n]: the tokens that may come next, in order."""
        return np.flatnonzero(np.unpackbits(self.mask.view(np.uint8), bitorder="little"))

    def mask_without(self, tokens: frozenset[int]) -> NDArray[np.uint32]:
        """The mask without these tokens, or as it is if they are all that may come."""
        mask = self.mask.copy()
        for token in tokens:
            mask[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
        return mask if mask.any() else self.mask

    def _note(self, seconds: float) -> None:
        self.seconds += NEWEST_SHARE * (seconds - self.seconds)

    def _took(self, allowed: bool) -> None:
        if not allowed:
            self.error = self._matcher.get_error() or "the token was not allowed"

    def _fill(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(*self._place)  # lets go of the interpreter
        self.mask, self.rows = self._own, None
        self._check(bool(self.mask.any()))

    def _check(self, allows: bool) -> None:
        """Whether the mask that the matcher has made is one. allows: any token."""
        if self._matcher.is_error():
            self.error = self._matcher.get_error()
        elif not allows:
            self.error = "no token of the vocabulary continues it"


def rows_of(matchings: ReadOnlyList[Matching]) -> Tensor | None:
    """int32[n, words], the masks of all n in this order, where they were computed together."""
    rows = matchings[0].rows
    if rows is None or len(rows) != len(matchings):
        return None
    together = all(each.rows is rows and each.row == row for row, each in enumerate(matchings))
    return rows if together else None


def advance_together(
    moves: Moves, executor: "LLExecutor", begun: Callable[[], object] = lambda: None, *, pinned: bool = False
) -> None:
    """`Matching.advance` of each, in threads of the library's own.

    That takes the interpreter's lock a few times a step, where threads of ours pass it on twice for every mask: at
    fdd8c9a a decode step of 64 rows of a JSON schema, 5.5 ms without masks, took 5.9 ms with ours and 5.6 so. The CPU
    time of each is not known. After a call that took long all count as slow once, and are timed alone until they are
    quick.

    Args:
        begun: called when the tokens are taken, and nothing is left that needs the interpreter's lock but the end.
        pinned: in memory from which a GPU copies without waiting.
    """
    started = time.perf_counter()
    moves = [(matching, token) for matching, token in moves if matching.error is None]
    if not moves:
        return
    try:
        allowed = executor.consume_token_par([(matching._matcher, token) for matching, token in moves])
        for (matching, _), one in zip(moves, allowed, strict=True):
            matching._took(one)
        going = [matching for matching, _ in moves if matching.error is None]
        rows = torch.empty(len(going), len(moves[0][0].mask), dtype=torch.int32, pin_memory=pinned)
        masks = rows.numpy().view(np.uint32)
        places = [(matching._matcher, row) for row, matching in enumerate(going)]
        begun()
        executor.unsafe_compute_mask_ptr(places, masks.ctypes.data, masks.strides[0], len(places))
        allowing = np.bitwise_or.reduce(masks, axis=1).tolist()
        for row, matching in enumerate(going):
            matching.mask, matching.rows, matching.row = masks[row], rows, row
            matching._check(bool(allowing[row]))
    except BaseException as error:  # as in `advance`, and of which output is not known
        for matching, _ in moves:
            matching.error = matching.error or f"{type(error).__name__}: {error}"
    if time.perf_counter() - started > TOGETHER_SECONDS:
        for matching, _ in moves:
            matching._note(SLOW_SECONDS)
