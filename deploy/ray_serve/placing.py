"""Where requests go among replicas that come and go: `Placement`, which knows engines by number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from server.engine.placement import Placement, Wanted


@dataclass(frozen=True)
class Standing:
    """What a replica says of itself. `rank` numbers a deployment's replicas from 0; `requests` run or wait there;
    `tiers` has the adapters in its memory, by the shortened digest.
    """

    rank: int
    alive: bool
    requests: int
    free_pages: int
    tiers: Mapping[str, str]


class _Placed(NamedTuple):
    wanted: Wanted
    rank: int


class ReplicaPlacement:
    """`placement` by the replicas' names. Replicas that have not reported yet, or are not alive, are not chosen."""

    def __init__(self, placement: Placement, engines: int) -> None:
        """`engines`: how many numbers `placement` has."""
        self._placement = placement
        self._engines = engines
        self._ranks: dict[str, int] = {}
        self._tiers: dict[int, Mapping[str, str]] = {}
        self._placed: dict[str, _Placed] = {}

    def __len__(self) -> int:
        """Requests that are placed."""
        return len(self._placed)

    def seen(self, standings: Mapping[str, Standing]) -> None:
        """These replicas are there, all others are gone."""
        usable = {name: each for name, each in standings.items() if each.alive and each.rank < self._engines}
        for name, rank in self._ranks.items():
            if name not in usable or usable[name].rank != rank:
                self._placement.lost(rank)
                self._tiers.pop(rank, None)
        self._ranks = {name: each.rank for name, each in usable.items()}
        for each in usable.values():
            before = self._tiers.get(each.rank, {})
            for digest, tier in each.tiers.items():
                if before.get(digest) != tier:
                    self._placement.moved(each.rank, digest, tier)
            for digest in before.keys() - each.tiers.keys():
                self._placement.moved(each.rank, digest, "disk")
            self._tiers[each.rank] = each.tiers
            self._placement.reported(each.rank, each.requests, each.free_pages)

    def choose(self, wanted: Wanted, names: Sequence[str]) -> str | None:
        """One of these replicas, None if nothing is known of any."""
        ranks = {self._ranks[name]: name for name in names if name in self._ranks}
        return ranks[self._placement.choose(wanted, list(ranks))] if ranks else None

    def begin(self, key: str, wanted: Wanted, name: str) -> None:
        """The replica gets the request `key`, and not another one that it was meant for before."""
        self.end(key)
        rank = self._ranks.get(name)
        if rank is not None:
            self._placed[key] = _Placed(wanted, rank)
            self._placement.begin(wanted, rank)

    def end(self, key: str) -> None:
        """Nobody has the request any more."""
        placed = self._placed.pop(key, None)
        if placed is not None:
            self._placement.end(*placed)
