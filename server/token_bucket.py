"""A budget that refills steadily, known in other places as a token bucket."""


class TokenBucket:
    """`rate` units a second, of which at most `capacity` are saved up. Full at first. Times are seconds of one clock.

    Within any span of t seconds at most capacity + rate * t are taken by those who wait until `wait` is 0. The level
    can fall below 0: what is known only afterwards is taken then, and later takers wait longer.
    """

    def __init__(self, rate: float, capacity: float, now: float) -> None:
        self.rate = rate
        self.capacity = capacity
        self._level = capacity
        self._time = now

    def level(self, now: float) -> float:
        """What can be taken. Asking changes nothing, so that no number of questions adds up rounding errors."""
        return min(self.capacity, self._level + max(0.0, now - self._time) * self.rate)

    def take(self, amount: float, now: float) -> None:
        """Take it, there or not."""
        self._set(self.level(now) - amount, now)

    def give_back(self, amount: float, now: float) -> None:
        """Undo a `take`: as if it had never been, but never beyond the capacity."""
        self._set(min(self.capacity, self.level(now) + amount), now)

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` is there, 0 if it is; infinite for more than the capacity."""
        if amount > self.capacity * (1 + _TOLERANCE):
            return float("inf")
        missing = amount - self.level(now)
        return missing / self.rate if missing > _TOLERANCE * max(1.0, amount) else 0.0

    def resize(self, rate: float, capacity: float, now: float) -> None:
        """Another budget: what it grows by can be taken at once, and what was taken stays taken."""
        level = self.level(now)
        grown = max(0.0, capacity - self.capacity)
        self.rate, self.capacity = rate, capacity
        self._set(min(capacity, level + grown), now)

    def _set(self, level: float, now: float) -> None:
        self._level = level
        self._time = max(self._time, now)


_TOLERANCE = 1e-9
"""Who waits as long as told finds what it waited for, whatever was rounded meanwhile."""
