"""Which tenants and adapters have labels of their own in the metrics."""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

OTHER = "other"
KEPT_COUNTS = 10
"""Names counted per label: enough to find those that come up, without growing with the number of adapters."""
LEAD = 2
"""A newcomer takes the place of the least used label when it is used this many times as often: labels do not flap."""
PAIRS = 2
"""Pairs of tenant and adapter for each of the adapters that have a label: most adapters belong to one tenant."""

N = TypeVar("N", bound=Hashable)


class TopLabels(Generic[N]):
    """The `limit` most used names keep a label of their own.

    `on_drop` hears of a name that lost its label, so that its series can be removed.
    """

    def __init__(self, limit: int, on_drop: Callable[[N], None]) -> None:
        self._limit = limit
        self._on_drop = on_drop
        self._uses: Counter[N] = Counter()
        self._labels: set[N] = set()
        self._least = 0  # no label is used less: counts only grow, so it is looked for again only when it matters

    def use(self, name: N) -> bool:
        """Count one use of `name`. Whether it has a label now."""
        self._uses[name] += 1
        if name not in self._labels:
            self._promote(name)
        if len(self._uses) > KEPT_COUNTS * self._limit:
            kept = dict(self._uses.most_common(len(self._uses) // 2))
            self._uses = Counter(kept | {label: self._uses[label] for label in self._labels})
        return name in self._labels

    def __contains__(self, name: N) -> bool:
        return name in self._labels

    def forget(self, names: Callable[[N], bool]) -> None:
        """These lose their labels and their counts, and nobody hears of it."""
        self._labels = {name for name in self._labels if not names(name)}
        self._uses = Counter({name: uses for name, uses in self._uses.items() if not names(name)})
        self._least = 0  # others come in with fewer uses

    def _promote(self, name: N) -> None:
        if len(self._labels) >= self._limit:
            if self._uses[name] < LEAD * self._least:
                return
            least = min(self._labels, key=lambda label: self._uses[label])
            self._least = self._uses[least]
            if self._uses[name] < LEAD * self._least:
                return
            self._labels.remove(least)
            self._on_drop(least)
        self._labels.add(name)


class RequestLabels:
    """Labels of tenant and adapter: at most `limit` of each, and twice as many pairs.

    An adapter without a label is `other`. Of a pair without one the tenant is `other`: an adapter that a thousand
    tenants use is still one adapter. `on_drop` hears of the labels that are gone, an adapter's or a pair's.
    """

    def __init__(self, limit: int, on_drop: Callable[[dict[str, str]], None]) -> None:
        self._on_drop = on_drop
        self._adapters: TopLabels[str] = TopLabels(limit, self._drop_adapter)
        self._pairs: TopLabels[tuple[str, str]] = TopLabels(PAIRS * limit, self._drop_pair)
        self._tenants: TopLabels[str] = TopLabels(limit, lambda tenant: on_drop({"tenant": tenant}))

    def use(self, tenant: str, adapter: str) -> None:
        """One use of an adapter by a tenant."""
        self._adapters.use(adapter)
        self._pairs.use((tenant, self.adapter(adapter)))

    def of(self, tenant: str, adapter: str) -> tuple[str, str]:
        """The labels of tenant and adapter."""
        pair = tenant, self.adapter(adapter)
        return pair if pair in self._pairs else (OTHER, pair[1])

    def adapter(self, name: str) -> str:
        return name if name in self._adapters else OTHER

    def tenant(self, name: str) -> str:
        """The label of a tenant where there is no adapter; counts as a use of it."""
        return name if self._tenants.use(name) else OTHER

    def _drop_adapter(self, adapter: str) -> None:
        self._pairs.forget(lambda pair: pair[1] == adapter)
        self._on_drop({"adapter": adapter})

    def _drop_pair(self, pair: tuple[str, str]) -> None:
        self._on_drop({"tenant": pair[0], "adapter": pair[1]})
