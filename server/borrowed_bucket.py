"""A part of a tenant's budget that this process has borrowed: it is used up here without asking anybody."""

from adapters_store.registry import BudgetGrant, BudgetWish

BUDGET_SECONDS = 1.0
"""So long a budget is kept; what is left of it goes back."""
RETRY_SECONDS = 0.05
"""Between two questions for what was not there: others give back what they do not use."""


class BorrowedBucket:
    """Behaves as a `TokenBucket` of what was borrowed, and knows roughly what is left for all.

    Before `take` comes `Meter.fund` with the same amount. As there the level can fall below 0: a debt, paid with the
    next budget.
    """

    def __init__(self, tenant: str, kind: str, rate: float, capacity: float, now: float, seconds: float) -> None:
        """A budget is worth `seconds` at most, unless a single `take` needs more."""
        self.rate = rate
        self.capacity = capacity
        self._seconds = seconds
        self._tenant = tenant
        self._kind = kind
        self._held = 0.0
        self._until = now
        self._recent = 0.0
        self._left = capacity
        self._left_time = now
        self._ask_again = now

    def level(self, now: float) -> float:
        """What this process could use, as far as it knows."""
        return min(self.capacity, self._held + self._left + max(0.0, now - self._left_time) * self.rate)

    def take(self, amount: float, now: float) -> None:  # noqa: ARG002
        self._held -= amount
        self._recent += amount

    def give_back(self, amount: float, now: float) -> None:  # noqa: ARG002
        self._held += amount
        self._recent -= amount

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be there, 0 if it was borrowed; infinite for more than the capacity."""
        if amount <= self._held + _TOLERANCE:
            return 0.0
        if amount > self.capacity * (1 + _TOLERANCE):
            return float("inf")
        return max(RETRY_SECONDS, (amount - self.level(now)) / self.rate)

    def resize(self, rate: float, capacity: float, now: float) -> None:
        """Another quota, which counts in full from the next budget on."""
        self._left = self.level(now) - self._held + max(0.0, capacity - self.capacity)
        self.rate, self.capacity, self._left_time, self._ask_again = rate, capacity, now, now

    def is_short(self, amount: float, now: float) -> bool:
        """Whether so much may be had by asking, and not without."""
        return (amount > self._held + _TOLERANCE or now >= self._until) and now >= self._ask_again

    def is_overdue(self, now: float) -> bool:
        """Whether something is to be given back, or a debt to be told."""
        return self._held < 0 or (self._held > 0 and now >= self._until)

    def wish(self, amount: float) -> BudgetWish:
        """What is held goes back; asked for is `amount`, and twice what was used lately: who idles takes little.

        `granted` or `failed` has to follow.
        """
        back, self._held = self._held, 0.0
        want = max(amount, min(amount + 2 * max(0.0, self._recent), self.rate * self._seconds)) if amount else 0.0
        return BudgetWish(self._tenant, self._kind, self.rate, self.capacity, back, amount, want)

    def granted(self, grant: BudgetGrant, wish: BudgetWish, now: float) -> None:
        if now >= self._until or grant.amount:
            self._until, self._recent = now + BUDGET_SECONDS, 0.0
        self._held += grant.amount
        self._left, self._left_time = grant.left, now
        self._ask_again = now + (RETRY_SECONDS if grant.amount < wish.need else 0.0)

    def failed(self, wish: BudgetWish) -> None:
        """Nothing was given back, as far as is known."""
        self._held += wish.back


_TOLERANCE = 1e-9
