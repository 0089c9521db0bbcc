"""Whose turn it is: one queue a tenant, ordered by virtual token counters.

Each tenant's counter grows by the tokens it was served, weighted by kind; the waiting tenant with the smallest counter
goes first. A tenant that had nothing waiting is lifted to the smallest counter among the waiting ones, so that time in
which it did not ask for its share earns no credit, even if it had something running (Sheng et al., Fairness in Serving
Large Language Models, 2024, algorithm 2).
"""

import heapq
from collections import deque
from collections.abc import Iterator

from server.engine.sequence import Sequence

INPUT_PRICE = 1.0
OUTPUT_PRICE = 2.0  # an output token costs a whole decode row, a prompt token shares its step with hundreds


class FairQueue:
    """Waiting sequences by tenant, and how many each tenant has running."""

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        self._queues: dict[str, deque[Sequence]] = {}
        self._running: dict[str, int] = {}
        self._last_waiting = ""  # the tenant whose queue was the last to become empty

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def push(self, sequence: Sequence) -> None:
        self._queue(sequence.request.tenant).append(sequence)

    def push_front(self, sequence: Sequence) -> None:
        """Queue a sequence that is being preempted ahead of its tenant's others. It still counts as running."""
        self._queue(sequence.request.tenant).appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        tenant = sequence.request.tenant
        self._queues[tenant].remove(sequence)
        if not self._queues[tenant]:
            del self._queues[tenant]
            self._last_waiting = tenant

    def started(self, sequence: Sequence) -> None:
        """Take a sequence out of the queue, into the running set; its prompt is charged the first time."""
        self.remove(sequence)
        tenant = sequence.request.tenant
        self._running[tenant] = self._running.get(tenant, 0) + 1
        if sequence.num_charged == 0:
            self.charge(sequence, sequence.num_prompt, INPUT_PRICE)

    def stopped(self, sequence: Sequence) -> None:
        """A running sequence ended or was preempted."""
        tenant = sequence.request.tenant
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]

    def charge(self, sequence: Sequence, tokens: int, price: float) -> None:
        sequence.num_charged += tokens
        tenant = sequence.request.tenant
        self.counters[tenant] = self.counters.get(tenant, 0.0) + tokens * price

    def in_turn(self) -> Iterator[Sequence]:
        """Waiting sequences in the order in which they should be tried, following the counters as they change.

        The caller may call `started` on the sequence it was just given; one it passes over is not given again.
        """
        rest = {tenant: iter(tuple(queue)) for tenant, queue in self._queues.items()}
        order = [(self.counters.get(tenant, 0.0), tenant) for tenant in rest]
        heapq.heapify(order)
        while order:
            tenant = order[0][1]
            sequence = next(rest[tenant], None)
            if sequence is None:
                heapq.heappop(order)
                continue
            yield sequence
            counter = self.counters.get(tenant, 0.0)
            if counter != order[0][0]:  # that of no other tenant may have changed
                heapq.heapreplace(order, (counter, tenant))

    def _queue(self, tenant: str) -> deque[Sequence]:
        """The tenant's queue; if it is new, the tenant's counter is lifted."""
        if tenant not in self._queues:
            self._lift(tenant)
            self._queues[tenant] = deque()
        return self._queues[tenant]

    def _lift(self, tenant: str) -> None:
        if self._queues:
            floor = min(self.counters.get(name, 0.0) for name in self._queues)
        elif self._running:
            floor = self.counters.get(self._last_waiting, 0.0)
        else:
            self.counters.clear()  # nobody is being served, so nobody is owed anything
            return
        self.counters[tenant] = max(self.counters.get(tenant, 0.0), floor)
