"""The way of a sequence into the scheduler's queue, and out of it at its end: wherever it is, it is found here."""

from server.engine.arrivals import Arrivals
from server.engine.config import RequestError
from server.engine.deciding import Deciding
from server.engine.decisions import Decision
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence


class Intake:
    """Reads what sequences need, holds back those that wait for another one's decision, and queues the others."""

    def __init__(self, arrivals: Arrivals, deciding: Deciding, scheduler: Scheduler) -> None:
        self._arrivals = arrivals
        self._deciding = deciding
        self._scheduler = scheduler
        self._stranded: dict[Sequence, RequestError] = {}  # held back by a decision, and then it cannot be served

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """The sequences that are not queued yet."""
        return (*self._arrivals.sequences, *self._deciding.followers, *self._stranded)

    def add(self, sequence: Sequence) -> None:
        """A request comes. Raises RequestError if it can never be served; else `remove` must be called at its end."""
        if sequence.asked.prompt_router is None or self._deciding.enter(sequence):
            try:
                self._admit(sequence)
            except RequestError:
                self._deciding.leave(sequence)
                raise

    def poll(self, *, idle: bool) -> list[tuple[Sequence, RequestError]]:
        """Queue what has been read. Gives what cannot be served after all, which stays here until it is removed."""
        failed = list(self._stranded.items())
        for sequence, error in self._arrivals.poll(idle=idle):
            if error is None:
                self._scheduler.add(sequence)
            else:
                failed.append((sequence, error))
        return failed

    def decide(self, sequence: Sequence, decision: Decision) -> None:
        """A router has decided for a prompt: now it is computed like others, and so are those that waited for it."""
        self._arrivals.forget_router(sequence)
        use = sequence.asked.prompt_router
        stays = use is not None and use.layered  # with the adapters that it has
        if not stays or sequence.num_unscored:
            self._scheduler.restart(sequence)
        followers = self._deciding.decide(sequence, decision)
        if not stays:
            self._go_on(sequence, first=True)
        elif sequence.num_unscored:
            self._scheduler.add(sequence, first=True)
        else:
            self._scheduler.resume(sequence)
        for follower in followers:
            self._go_on(follower)

    def remove(self, sequence: Sequence, *, forget: bool = False) -> None:
        """A sequence ends, wherever it is; see `Scheduler.remove`. If it was to decide for others, one of them does."""
        self._arrivals.forget_grammar(sequence)
        if not (self._stranded.pop(sequence, None) or self._deciding.waits(sequence) or self._arrivals.leave(sequence)):
            self._scheduler.remove(sequence, forget=forget)
        successor = self._deciding.leave(sequence)
        if successor is not None:
            self._go_on(successor)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless whoever waits does so for something."""
        self._arrivals.check_integrity()
        self._deciding.check_integrity()

    def _admit(self, sequence: Sequence, *, first: bool = False) -> None:
        if self._arrivals.add(sequence):
            self._scheduler.add(sequence, first=first)

    def _go_on(self, sequence: Sequence, *, first: bool = False) -> None:
        try:
            self._admit(sequence, first=first)
        except RequestError as error:
            self._stranded[sequence] = error
