"""Requests that have no first token yet: how many there may be, and how long one that comes now will wait.

The wait is estimated from the time between two first tokens while somebody waited, which is what the engine can do, and
from the requests ahead. Tenants take turns by their weights, so ahead of a request are those of its own tenant, as
often as all weights together contain its own, and never more than all that wait.
"""

from collections import Counter
from collections.abc import Callable

from server.board import Slot
from server.errors import DeadlineTooNear, Unavailable
from server.tenants import Tenant

SAMPLES = 16
"""First tokens that count, as an exponential mean, and that must have been seen before anybody is refused."""
CERTAIN = 1.5
"""A request is refused when its wait is estimated at so many times of what it has: estimates are rough."""
FORGOTTEN = 60.0
"""Seconds after which a rate says nothing any more."""


class Waiting:
    """At most `most` at a time, those of other processes of this server included. `clock` counts seconds."""

    def __init__(self, most: int, clock: Callable[[], float], slot: Slot | None = None) -> None:
        """`slot`: where this process's number is shown to others, and theirs to it."""
        self._most = most
        self._slot = slot or Slot()
        self._clock = clock
        self._number = 0
        self._of: Counter[Tenant] = Counter()
        self._gap = 0.0  # mean seconds between two first tokens
        self._samples = 0
        self._since = 0.0  # the last first token or, if nobody waited since, the first who came

    def __len__(self) -> int:
        return self._number

    def check(self, tenant: Tenant, timeout: float | None, *, is_urgent: bool = False) -> None:
        """Raises Unavailable when too many wait, and DeadlineTooNear for one that would begin after its `timeout`.

        An answer that nobody waits for any more costs the same as one that is read. An urgent request may overtake
        others of its tenant, so nobody knows when it begins.
        """
        if self._number + self._slot.others >= self._most:
            raise Unavailable(f"the queue is full: {self._most} requests wait already", code="queue_full")
        if timeout is None or is_urgent:
            return
        wait = self.estimate(tenant)
        if wait > CERTAIN * timeout:
            raise DeadlineTooNear(wait, timeout)

    def estimate(self, tenant: Tenant) -> float:
        """Seconds until a request of this tenant that comes now has its first token; 0 if nobody knows, or waits."""
        if not self._number or self._samples < SAMPLES or self._clock() - self._since > FORGOTTEN:
            return 0.0
        weights = sum(each.weight for each in self._of) + (tenant.weight if tenant not in self._of else 0.0)
        ahead = min(float(self._number), self._of[tenant] * weights / tenant.weight)
        return (ahead + 1) * self._gap

    def enter(self, tenant: Tenant) -> None:
        """A request comes; `leave` must be called once."""
        if not self._number:
            self._since = self._clock()
        self._number += 1
        self._slot.set(self._number)
        self._of[tenant] += 1

    def leave(self, tenant: Tenant, *, started: bool) -> None:
        """It has its first token, or has ended without one."""
        self._number -= 1
        self._slot.set(self._number)
        self._of[tenant] -= 1
        if not self._of[tenant]:
            del self._of[tenant]
        if not started:
            return
        now = self._clock()
        gap, self._since = now - self._since, now
        self._samples += 1
        self._gap += (gap - self._gap) / min(self._samples, SAMPLES)
