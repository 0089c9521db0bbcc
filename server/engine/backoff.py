"""How long a dead engine's successor is held back."""

FIRST_BACKOFF = 0.5
LONGEST_BACKOFF = 30.0


class Backoff:
    """None where the dead engine had done its work, as one killed from outside has; else twice as long each time.

    What keeps engines from ever working (a full GPU, a damaged file) is not there again a moment later; an engine that
    answered requests is missed.
    """

    def __init__(self, first: float = FIRST_BACKOFF, longest: float = LONGEST_BACKOFF) -> None:
        self.longest = longest
        self._first = first
        self._next = first

    def after(self, *, proven: bool) -> float:
        """Seconds to wait now that an engine has died. `proven`: it had answered a request, or lived for long."""
        if proven:
            self._next = self._first
            return 0.0
        wait, self._next = self._next, min(2 * self._next, self.longest)
        return wait
