"""What lives in the device's pages, and which of it makes room for others."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from adapters_store.types import Composition, Mix


class State(Enum):
    """Of a resident's pages: being written, written, or given up."""

    LOADING = auto()
    LOADED = auto()
    FAILED = auto()


@dataclass(eq=False)
class Resident:
    """An adapter, or a materialised fusion: page ids, their ranks, and once it is loaded the scale, by group name.

    `references`: leases and reservations that hold it.
    """

    pages: dict[str, tuple[int, ...]]
    ranks: dict[str, tuple[int, ...]]
    scales: Mapping[str, float] = field(default_factory=dict)
    state: State = State.LOADING
    references: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """Pages by group name."""
        return {name: len(pages) for name, pages in self.pages.items()}


def resident_keys(mix: Mix) -> tuple[str, ...]:
    """The residents that serve a mix: its adapters, or the one synthetic adapter of a fusion."""
    return (mix.digest,) if mix.composition is Composition.FUSION else mix.digests


def choose_victims(idle: Iterable[tuple[str, Mapping[str, int]]], short: Mapping[str, int]) -> list[str] | None:
    """The residents to evict, no more than it takes, or None if all together are not enough.

    `idle` gives key and pages by group name of what may go, in the order in which it should; `short` how many pages
    are lacking by group name, at most 0 where none is.
    """
    lacking = dict(short)
    victims: list[tuple[str, Mapping[str, int]]] = []
    for key, pages in idle:
        if all(count <= 0 for count in lacking.values()):
            break
        if any(lacking.get(name, 0) > 0 for name in pages):
            victims.append((key, pages))
            lacking = {name: count - pages.get(name, 0) for name, count in lacking.items()}
    if any(count > 0 for count in lacking.values()):
        return None
    needed: list[str] = []
    for key, pages in reversed(victims):  # a later victim may have made an earlier one unnecessary
        without = {name: count + pages.get(name, 0) for name, count in lacking.items()}
        if all(count <= 0 for count in without.values()):
            lacking = without
        else:
            needed.append(key)
    return needed[::-1]
