"""What happens when the rank pages of a waiting sequence stay missing: in its turn, room is kept for it.

A sequence that was passed over `STARVATION_STEPS` times for lack of pages may *starve*: until it starts, nothing is
admitted that would not leave it room, whose pages and those of all that has started meanwhile do not fit beside its
own. Sequences without adapters go on. So a mix of any size gets its pages when those that ran before have ended.

That must be no way around the fairness among tenants, for whoever asks for all pages at once stops all others:

- Only the tenant whose turn it is may starve: of those whose pages were missing in a step, the one served least, if
  none that holds pages was served less. Who lacked them for as many steps without a sequence that may starve, as its
  clients gave up before, loses its turn.
- Nobody does twice in a row while it is another tenant's turn besides.
- Pages are paid for where they are what is short. In each step, an output token for each row that stays free although
  somebody waits for pages is charged to the tenants that hold them, by how many, or to the one that starves if it is
  for its sake. So whoever has all pages is not in turn again before the others have been served as much.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Protocol

from adapters_store.page_lease import PageLease
from adapters_store.types import Mix
from server.engine.fairness import OUTPUT_PRICE, FairQueue
from server.engine.plan import Plan
from server.engine.sequence import Request, Sequence

STARVATION_STEPS = 64
KEPT_OFF = 16  # mixes that are looked at in one step while one starves, each against all that started meanwhile


class AdapterPages(Protocol):
    """Device pages of adapters, as the scheduler sees them."""

    def acquire(self, request: Request) -> PageLease | None:
        """All pages of the request's mix, or None when they cannot be had now or are being loaded.

        Raises RequestError when they never can, as for an adapter that cannot be read.
        """
        ...

    def is_loading(self, mix: Mix) -> bool:
        """Whether the pages of `mix` are reserved, and its adapters on their way into them."""
        ...

    def can_load(self, mix: Mix) -> bool:
        """Whether the pages of `mix` are there, or could be had now."""
        ...

    def fit_together(self, mixes: Iterable[Mix]) -> bool:
        """Whether the pages of all these mixes could be had at once if no others held any."""
        ...

    def release(self, lease: PageLease) -> None: ...


class Starvation:
    """The one sequence that starves, if there is one, and what is kept off for it."""

    def __init__(self, queue: FairQueue, pages: AdapterPages) -> None:
        self.sequence: Sequence | None = None
        self._queue = queue
        self._pages = pages
        self._last = ""  # tenant of the last one that starved until it started
        self._beside: list[Sequence] = []  # what has started since, with adapters
        self._missed: dict[str, Sequence | None] = {}  # in this step, by tenant in turn: its first that may starve
        self._steps: dict[str, int] = {}  # by tenant: the last ones in a row in which it missed pages
        self._is_kept = False  # room, in this step
        self._num_missed: Counter[str] = Counter()  # sequences, by tenant
        self._kept_off: dict[str, bool] = {}  # in this step, by digest of a mix: whether it could have been loaded
        self._idle = 0  # sequences of others that are kept off, and would run

    def in_turn(self, plan: Plan) -> Iterator[Sequence]:
        """`FairQueue.in_turn`, but first the one that starves."""
        first = self.sequence
        if first is not None:
            yield first
            self._is_kept = first is self.sequence and not self._pages.is_loading(first.request.mix)
        for sequence in self._queue.in_turn(plan.passed, plan.only_plain):
            if sequence is not first:
                yield sequence

    def leaves_room(self, sequence: Sequence) -> bool:
        """Whether a sequence with adapters may be admitted, as far as the one that starves is concerned."""
        starving, mix = self.sequence, sequence.request.mix
        if starving is None or not self._is_kept:
            return True
        if mix.digest not in self._kept_off:
            if len(self._kept_off) >= KEPT_OFF:
                return False
            self._beside = [other for other in self._beside if other.lease is not None]
            beside = [other.request.mix for other in self._beside]
            if self._pages.fit_together([starving.request.mix, mix, *beside]):
                return True
            self._kept_off[mix.digest] = self._pages.can_load(mix)
        if sequence.request.tenant != starving.request.tenant:
            self._idle += self._kept_off[mix.digest]
        return False

    def missed(self, sequence: Sequence) -> None:
        """The pages of a sequence whose turn it was could not be had."""
        sequence.skipped_steps += 1
        tenant = sequence.request.tenant
        self._num_missed[tenant] += 1
        if self._missed.get(tenant) is None:
            self._missed[tenant] = sequence if sequence.skipped_steps >= STARVATION_STEPS else None

    def left(self, sequence: Sequence) -> None:
        """A sequence waits no longer. If it runs now it has its lease."""
        if sequence.lease is not None:
            self._steps.pop(sequence.request.tenant, None)
            if sequence is self.sequence:
                self._last = sequence.request.tenant
            elif self.sequence is not None:
                self._beside.append(sequence)
        if sequence is self.sequence:
            self.sequence = None

    def lacks_blocks(self, sequence: Sequence) -> None:
        """Nothing else is admitted in this step, as the KV blocks of a sequence are missing."""
        if sequence is self.sequence:
            self._idle = len(self._queue) - 1

    def settle(self, running: Collection[Sequence], free_rows: int) -> None:
        """The end of a step, in which `free_rows` rows stay free."""
        held = self._held(running) if self._missed else Counter()
        if self.sequence is None:
            self.sequence = self._next(held)
            self._beside.clear()
        elif idle := min(free_rows, self._idle):
            self._queue.charge_tenant(self.sequence.request.tenant, OUTPUT_PRICE * idle)
        self._charge(held, free_rows)
        self._missed.clear()
        self._num_missed.clear()
        self._kept_off.clear()
        self._idle, self._is_kept = 0, False

    def _held(self, running: Collection[Sequence]) -> Counter[str]:
        """Pages that are held, by tenant. What sequences share counts for each."""
        held: Counter[str] = Counter()
        for sequence in running:
            if sequence.lease is not None:
                held[sequence.request.tenant] += sum(map(len, sequence.lease.pages.values()))
        return held

    def _charge(self, held: Counter[str], free_rows: int) -> None:
        """Charge rows that stay free for lack of pages to those who hold the pages, by how many they hold."""
        total, missed = held.total(), self._num_missed.total()
        for tenant, pages in held.items():
            idle = min(free_rows, missed - self._num_missed[tenant])
            if idle and pages:
                self._queue.charge_tenant(tenant, OUTPUT_PRICE * idle * pages / total)

    def _next(self, held: Counter[str]) -> Sequence | None:
        """The sequence that starves from now on."""
        self._steps = {tenant: 1 + self._steps.get(tenant, 0) for tenant in self._missed}
        turns = [
            tenant
            for tenant, sequence in self._missed.items()
            if sequence is not None or self._steps[tenant] < STARVATION_STEPS
        ]
        tenant = next((tenant for tenant in turns if tenant != self._last), self._last)
        expected = self._queue.expected
        is_in_turn = all(expected(tenant) <= expected(holder) for holder in held if holder != tenant)
        return self._missed.get(tenant) if is_in_turn else None
