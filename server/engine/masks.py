"""Threads that compute the masks of constrained outputs beside the steps, and the masks' way to the device."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as ReadOnlyList
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.engine.config import EngineConfig, RequestError
from server.engine.matching import Matching, Moves, advance_together
from server.engine.plan import Chunk
from server.engine.sequence import Sequence
from server.logs import FIELDS

if TYPE_CHECKING:
    from llguidance import LLExecutor

logger = logging.getLogger(__name__)

MOST_THREADS = 14
"""With 16 cores a decode step of 64 rows of a JSON schema, 5.5 ms without masks, takes 6.1 ms with 14 threads and 6.8
with eight; with 15 as with 14."""

POLL_SECONDS = 3e-4
"""Between two looks at the device and at the masks that are still missing. Threads tell of masks when nothing is left
to compute: to be woken for each costs whoever waits the interpreter's lock, and those who compute as well."""

HANDOVER_SECONDS = 1e-3
"""For which threads have the interpreter's lock to themselves, at most, while they take over a step's tokens. A thread
that needs it back within that time would wait for what the engine does with the same tokens, half a millisecond: a step
of 64 rows of a JSON schema took 6.3 ms with this and 7.1 without on a machine whose masks were slow, and 6.3 and 6.4 on
another."""


def mask_threads(config: EngineConfig) -> int:
    """The cores that this process may use but two, unless the configuration says otherwise."""
    return config.mask_threads or max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) - 2))


class MaskThreads:
    """Advances matchings: threads for all, and another one for the slow, which therefore delay only each other.

    idled: seconds for which the last step's masks were waited for when the device had nothing more to do.
    pinned: masks are copied to a GPU.
    """

    def __init__(self, num_threads: int, clock: Callable[[], float] = time.monotonic, *, pinned: bool = False) -> None:
        self.idled = 0.0
        self._pinned = pinned
        self._clock = clock
        self._num_threads = num_threads
        self._lanes = (ThreadPoolExecutor(num_threads, "masks"), ThreadPoolExecutor(1, "slow-masks"))
        self._news = threading.Condition()
        self._begun = threading.Event()
        self._executor: LLExecutor | None = None
        self._alone = False
        self._short = False

    def advance(self, moves: Moves) -> None:
        """Compute the mask behind each token. The matchings are `pending` until that is done."""
        self._begun.clear()
        for matching, _ in moves:
            matching.pending = True
        # Shared out before any is computed: what was quick may be slow by then, and would be so once more.
        quick, slow = (shared_out([move for move in moves if move[0].slow is late]) for late in (False, True))
        together = not self._alone and any(map(common, islice(quick, self._num_threads)))  # what is begun at once
        for lane, groups, threads in zip(self._lanes, (quick, slow), (self._num_threads, 1), strict=True):
            try:
                for _ in range(min(len(groups), threads)):
                    lane.submit(self._run, groups)
            except RuntimeError as error:  # the system has no thread for it: those that there are do it with this one
                if not self._short:
                    logger.warning("masks hold up the engine's steps: %s", error)
                self._short = True
                self._run(groups)
        if together:
            self._begun.wait(HANDOVER_SECONDS)
        elif moves:
            time.sleep(0)  # lets the threads have the interpreter's lock until they no longer need it

    def wait(self, matchings: ReadOnlyList[Matching], seconds: float) -> None:
        """Return when none of them is pending, at the latest after this time."""
        with self._news:
            self._news.wait_for(lambda: not any(matching.pending for matching in matchings), seconds)

    def settle(
        self, chunks: ReadOnlyList[Chunk], running: Callable[[], bool], step_seconds: float
    ) -> list[tuple[Chunk, Matching]]:
        """Wait for the masks of a step. Returns its constrained chunks; those that are given up are `behind`, and stay
        so until a step finds them ready. running: whether the device still runs the model for this step."""
        pairs = constrained(chunks)
        self.outwait([matching for _, matching in pairs], sum(c.samples for c in chunks), running, step_seconds)
        for _, matching in pairs:
            matching.behind = matching.pending
        return pairs

    def outwait(
        self, matchings: ReadOnlyList[Matching], rows: int, running: Callable[[], bool], step_seconds: float
    ) -> None:
        """Return when none of them is pending, or waiting costs more than it is worth.

        Waiting for an idle device costs all rows of the step its time, and giving up costs those without a mask a step:
        neither costs more than twice what the better one would have.
        """
        idle_since = None
        self.idled = 0.0
        with self._news:
            while missing := sum(matching.pending for matching in matchings):
                if idle_since is None and running():
                    self._news.wait(POLL_SECONDS)
                    continue
                idle_since = self._clock() if idle_since is None else idle_since
                left = step_seconds * missing / rows - self.idled
                if left <= 0:
                    return
                self._news.wait(min(left, POLL_SECONDS))
                self.idled = self._clock() - idle_since

    def close(self) -> None:
        """Begin nothing more."""
        for lane in self._lanes:
            lane.shutdown(wait=False, cancel_futures=True)

    def _run(self, groups: deque[Moves]) -> None:
        while (group := take(groups)) is not None:
            library = self._library_threads() if common(group) else None
            if library is not None:
                advance_together(group, library, self._begun.set, pinned=self._pinned)
                for matching, _ in group:
                    matching.pending = False
            else:
                for matching, token in group:
                    matching.advance(token)
                    matching.pending = False
        self._begun.set()  # also where what began raised, or was computed one by one
        with self._news:
            self._news.notify_all()

    def _library_threads(self) -> "LLExecutor | None":
        """None if they cannot be had, as where the threads of a container are limited: ours do it alone then."""
        with self._news:
            if self._executor is None and not self._alone:
                from llguidance import LLExecutor

                try:
                    self._executor = LLExecutor(self._num_threads)
                except BaseException as error:  # also a panic: the outputs of this group wait for us
                    self._alone = True
                    logger.warning("no %d threads to compute masks together: %s", self._num_threads, error)
            return self._executor


def take(groups: deque[Moves]) -> Moves | None:
    try:
        return groups.popleft()
    except IndexError:  # another thread took the last
        return None


def common(group: Moves) -> bool:
    """Whether its masks are computed in one call."""
    return len(group) > 1 and group[0][0].quick


def shared_out(moves: Moves) -> deque[Moves]:
    """For threads to take from, those first that have taken longest: what is quick and of one grammar together, since
    the library shares that out by itself, and what is not by lexer."""
    groups: dict[object, list[tuple[Matching, int]]] = {}
    for matching, token in moves:
        key = matching.grammar if matching.quick else matching.lexer
        groups.setdefault((matching.quick, id(key)), []).append((matching, token))
    return deque(sorted(groups.values(), key=lambda group: -sum(matching.seconds for matching, _ in group)))


def moves(tokens: Iterable[tuple[Sequence, int | None]]) -> Moves:
    """Of sequences and their new tokens those that a grammar had to allow."""
    return [
        (sequence.matching, token) for sequence, token in tokens if sequence.matching is not None and token is not None
    ]


def constrained(chunks: Iterable[Chunk]) -> list[tuple[Chunk, Matching]]:
    """The chunks that yield a token which a grammar must allow."""
    pairs = [(chunk, chunk.sequence.matching) for chunk in chunks if chunk.samples]
    return [(chunk, matching) for chunk, matching in pairs if matching is not None]


def no_mask(sequence: Sequence, matching: Matching) -> RequestError:
    """What a request whose output cannot be continued ends with."""
    constraint = sequence.request.params.constraint
    assert constraint is not None
    logger.warning("a request has no mask: %s", matching.error, extra={FIELDS: sequence.request.log_fields})
    return RequestError(
        f"{constraint.param}: at token {sequence.num_output + 1} it is too complex, or nothing can follow",
        param=constraint.param,
        code="invalid_constraint",
    )


def upload_masks(masks: ReadOnlyList[NDArray[np.uint32]], device: torch.device) -> Tensor:
    """int32[len(masks), words] on `device`, in one copy that nothing waits for."""
    host = torch.empty(len(masks), len(masks[0]), dtype=torch.int32, pin_memory=device.type == "cuda")
    np.stack(masks, out=host.numpy().view(np.uint32))
    return host.to(device, non_blocking=True)
