"""Which adapters have a label of their own in the metrics."""

from collections import Counter
from collections.abc import Callable

OTHER = "other"
KEPT_COUNTS = 10
"""Names counted per label: enough to find those that come up, without growing with the number of adapters."""
LEAD = 2
"""A newcomer takes the place of the least used label when it is used this many times as often: labels do not flap."""


class TopLabels:
    """The `limit` most used names keep their own label; the rest share `other`.

    `on_drop` hears of a name that lost its label, so that its series can be removed.
    """

    def __init__(self, limit: int, on_drop: Callable[[str], None]) -> None:
        self._limit = limit
        self._on_drop = on_drop
        self._uses: Counter[str] = Counter()
        self._labels: set[str] = set()

    def use(self, name: str) -> str:
        """Count one use of `name` and return its label."""
        self._uses[name] += 1
        if name not in self._labels:
            self._promote(name)
        if len(self._uses) > KEPT_COUNTS * self._limit:
            kept = dict(self._uses.most_common(len(self._uses) // 2))
            self._uses = Counter(kept | {label: self._uses[label] for label in self._labels})
        return self.label(name)

    def label(self, name: str) -> str:
        return name if name in self._labels else OTHER

    def _promote(self, name: str) -> None:
        if len(self._labels) >= self._limit:
            least = min(self._labels, key=lambda label: self._uses[label])
            if self._uses[name] < LEAD * self._uses[least]:
                return
            self._labels.remove(least)
            self._on_drop(least)
        self._labels.add(name)
