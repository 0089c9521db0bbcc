"""Whose turn it is: one queue a tenant, ordered by virtual token counters.

Each tenant's counter grows by the tokens it was served, priced by kind and divided by the tenant's weight; the waiting
tenant with the smallest counter goes first. A tenant that had nothing waiting is lifted to the smallest counter among
the waiting ones, so that time in which it did not ask for its share earns no credit, even if it had something running
(Sheng et al., Fairness in Serving Large Language Models, 2024, algorithm 2). Two things differ from there:

- What a tenant was owed when its last request started stays owed as long as something of it runs. Otherwise one that
  sends a request for each answer would be forgiven its weight: 1 : 1.2 where 1 : 3 was due, with 4 waiting for 8 rows.
- Turns look ahead: a running sequence counts as if it had made `EXPECTED` more tokens. Otherwise rows that become free
  together all go to one tenant, however little it lacks, and have to be taken back: 0.1 to 0.5 preemptions a request
  between two tenants that always wait, against 0 to 0.03.

Within a tenant's queue requests start in the order of their arrival, as if one of priority p had come p times
`PRIORITY_SECONDS` later. So only those overtake it that come within a time known beforehand, and none waits forever.
What was preempted goes on first. Priorities take nothing from what runs, and nothing from other tenants.
"""

import heapq
from collections import deque
from collections.abc import Callable, Container, Iterator

from server.engine.sequence import Sequence

INPUT_PRICE = 1.0
OUTPUT_PRICE = 2.0  # an output token costs a whole decode row, a prompt token shares its step with hundreds
EXPECTED = 32  # tokens; 16 and 64 do as well
PRIORITY_SECONDS = 10.0
LEAST_WEIGHT, MOST_WEIGHT = 1e-3, 1e3
REBASE = 1e9  # a token of the largest weight is 1e-3 and counts as such beside it, with 4 digits


class FairQueue:
    """Waiting sequences by tenant, and how many each tenant has running.

    A tenant's weight is that of the request it queued last, within `LEAST_WEIGHT` and `MOST_WEIGHT`.
    """

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._queues: dict[str, deque[Sequence]] = {}
        self._plain: dict[str, deque[Sequence]] = {}  # of these, the sequences without adapters
        self.running: dict[str, int] = {}
        self._last_waiting = ""  # the tenant whose queue was the last to become empty
        self._credits: dict[str, float] = {}  # what a tenant was owed when its queue became empty
        self._most = REBASE  # the counter above which all are counted anew

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    @property
    def contended(self) -> bool:
        """Whether a tenant waits that is not the only one served."""
        return bool(self._queues) and len(self._queues.keys() | self.running.keys()) > 1

    def weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def excess(self, tenant: str, other: str) -> float:
        """Priced tokens that `tenant` was served beyond what its weight entitled it to beside `other`; < 0: below."""
        return (self.counters.get(tenant, 0.0) - self.counters.get(other, 0.0)) * self.weight(tenant)

    def push(self, sequence: Sequence) -> None:
        request = sequence.request
        _insert(self._queue(request.tenant), sequence)
        if not request.mix.entries:
            _insert(self._plain[request.tenant], sequence)
        self._weights[request.tenant] = _bounded(request.weight)

    def push_front(self, sequence: Sequence) -> None:
        """Queue a sequence ahead of its tenant's others. One that is being preempted still counts as running."""
        self._queue(sequence.request.tenant).appendleft(sequence)
        if not sequence.request.mix.entries:
            self._plain[sequence.request.tenant].appendleft(sequence)
        self._weights.setdefault(sequence.request.tenant, _bounded(sequence.request.weight))

    def remove(self, sequence: Sequence) -> None:
        tenant = sequence.request.tenant
        self._queues[tenant].remove(sequence)
        if not sequence.request.mix.entries:
            self._plain[tenant].remove(sequence)
        if not self._queues[tenant]:
            del self._queues[tenant], self._plain[tenant]
            self._last_waiting = tenant
            self._credits[tenant] = self._floor(tenant) - self.counters.get(tenant, 0.0)

    def started(self, sequence: Sequence) -> None:
        """Take a sequence out of the queue, into the running set; its prompt is charged the first time."""
        self.remove(sequence)
        tenant = sequence.request.tenant
        self.running[tenant] = self.running.get(tenant, 0) + 1
        if sequence.num_charged == 0:
            self.charge(sequence, sequence.num_prompt, INPUT_PRICE)

    def stopped(self, sequence: Sequence) -> None:
        """A running sequence ended or was preempted."""
        tenant = sequence.request.tenant
        self.running[tenant] -= 1
        if not self.running[tenant]:
            del self.running[tenant]
            self._credits.pop(tenant, None)

    def charge(self, sequence: Sequence, tokens: int, price: float) -> None:
        sequence.num_charged += tokens
        self.charge_tenant(sequence.request.tenant, tokens * price)

    def charge_tenant(self, tenant: str, priced: float) -> None:
        """Charge priced tokens that a tenant was served, or that others were not because of it."""
        counter = self.counters[tenant] = self.counters.get(tenant, 0.0) + priced / self.weight(tenant)
        if counter > self._most:
            self._rebase()

    def in_turn(
        self, passed: Container[str] = (), only_plain: Callable[[str], bool] = lambda _: False
    ) -> Iterator[Sequence]:
        """Waiting sequences in the order in which they should be tried, following the counters as they change.

        The caller may call `started` on the sequence it was just given; one it passes over is not given again, none of
        the tenants that are in `passed` by then, and none with adapters of those that are `only_plain` by then.
        """
        rest: dict[str, Iterator[Sequence]] = {}
        plain: set[str] = set()
        order = [(self.expected(tenant), tenant) for tenant in self._queues]
        heapq.heapify(order)
        while order:
            tenant = order[0][1]
            if tenant not in rest:
                rest[tenant] = iter(tuple(self._queues.get(tenant, ())))
            if tenant not in plain and only_plain(tenant):
                plain.add(tenant)
                rest[tenant] = iter(tuple(self._plain.get(tenant, ())))
            sequence = None if tenant in passed else next(rest[tenant], None)
            if sequence is None:
                heapq.heappop(order)
                continue
            yield sequence
            expected = self.expected(tenant)
            if expected != order[0][0]:
                heapq.heapreplace(order, (expected, tenant))

    def expected(self, tenant: str) -> float:
        """The counter as it will soon be."""
        coming = self.running.get(tenant, 0) * EXPECTED * OUTPUT_PRICE
        return self.counters.get(tenant, 0.0) + coming / self.weight(tenant)

    def _queue(self, tenant: str) -> deque[Sequence]:
        """The tenant's queue; if it is new, the tenant's counter is lifted."""
        if tenant not in self._queues:
            self._lift(tenant)
            self._queues[tenant], self._plain[tenant] = deque(), deque()
        return self._queues[tenant]

    def _lift(self, tenant: str) -> None:
        if not self._queues and not self.running:  # nobody is being served, so nobody is owed anything
            self.counters.clear()
            self._weights.clear()
            self._credits.clear()
            self._most = REBASE
            return
        credit = max(0.0, self._credits.pop(tenant, 0.0)) if tenant in self.running else 0.0
        counter = self.counters.get(tenant, 0.0)
        self.counters[tenant] = max(counter, self._floor(tenant) - credit)

    def _rebase(self) -> None:
        """Count from the smallest counter of those that wait or run, so that small steps are not lost in large sums.

        Others below it would be lifted to it if they came back.
        """
        served = self._queues.keys() | self.running.keys()
        base = min((self.counters.get(tenant, 0.0) for tenant in served), default=0.0)
        self._weights = {tenant: weight for tenant, weight in self._weights.items() if tenant in served}
        self.counters = {tenant: own - base for tenant, own in self.counters.items() if own > base or tenant in served}
        self._most = max(REBASE, 2 * max(self.counters.values(), default=0.0))

    def _floor(self, tenant: str) -> float:
        """The smallest counter of those that wait; where nobody does, of who waited last, or of all that run."""
        if self._queues:
            return min(self.counters.get(name, 0.0) for name in self._queues)
        if self._last_waiting in self.running:
            return self.counters.get(self._last_waiting, 0.0)
        return max((self.counters.get(name, 0.0) for name in self.running), default=self.counters.get(tenant, 0.0))


def _due(sequence: Sequence) -> float:
    return sequence.arrival + PRIORITY_SECONDS * sequence.request.priority


def _insert(queue: deque[Sequence], sequence: Sequence) -> None:
    """Behind all that are due at the same time or before."""
    due, index = _due(sequence), len(queue)
    for other in reversed(queue):
        if _due(other) <= due:
            break
        index -= 1
    queue.insert(index, sequence)


def _bounded(weight: float) -> float:
    return min(max(weight, LEAST_WEIGHT), MOST_WEIGHT)
