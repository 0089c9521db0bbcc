"""What a front end knows of all engines, from their reports."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count

from deploy.ray_serve.wire import Report
from server.engine.config import EngineInfo, EngineStats

TIERS = ("device", "host", "disk")
"""From the fastest."""


@dataclass(frozen=True)
class FleetMember:
    """One engine, as it was when it reported last."""

    info: EngineInfo | None
    alive: bool
    stalled: bool
    stats: EngineStats


class Fleet:
    """The engines by replica. Each has a number while it is known, the smallest that is free then.

    `on_residency` hears where an adapter is, on the engine that has it nearest; `on_stats` an engine's number and
    snapshot, of one that is gone an empty one.
    """

    def __init__(self) -> None:
        self.info: EngineInfo | None = None
        self.on_residency: Callable[[str, str], None] | None = None
        self.on_stats: Callable[[int, EngineStats], None] | None = None
        self._reports: dict[str, Report] = {}
        self._numbers: dict[str, int] = {}
        self._tiers: dict[str, dict[str, str]] = {}  # of each replica by digest, without what is on disk
        self._told: dict[str, str] = {}

    @property
    def replicas(self) -> tuple[str, ...]:
        return tuple(self._reports)

    @property
    def members(self) -> tuple[FleetMember, ...]:
        """In the order of their numbers."""
        reports = [self._reports[name] for name in sorted(self._reports, key=self._numbers.__getitem__)]
        return tuple(FleetMember(self.info, report.alive, report.stalled, report.stats) for report in reports)

    @property
    def alive(self) -> bool:
        """Whether some engine lives."""
        return any(report.alive for report in self._reports.values())

    def version(self, replica: str) -> int:
        """Of its last report; 0 before the first."""
        return self._reports[replica].version if replica in self._reports else 0

    def heard(self, report: Report) -> None:
        """A replica has said how it is."""
        if report.replica not in self._numbers:
            taken = set(self._numbers.values())
            self._numbers[report.replica] = next(number for number in count() if number not in taken)
        self._reports[report.replica] = report
        tiers = self._tiers.setdefault(report.replica, {})
        for digest, tier in report.tiers.items():
            if tier == "disk":
                tiers.pop(digest, None)
            else:
                tiers[digest] = tier
        self._tell(self._numbers[report.replica], report.stats, report.tiers)

    def lost(self, replica: str) -> None:
        """A replica is gone, with all that it had in memory."""
        if self._reports.pop(replica, None) is not None:
            self._tell(self._numbers.pop(replica), EngineStats(), self._tiers.pop(replica))

    def _tell(self, number: int, stats: EngineStats, digests: Iterable[str]) -> None:
        if self.on_stats is not None:
            self.on_stats(number, stats)
        for digest in digests:
            tier = min((tiers.get(digest, "disk") for tiers in self._tiers.values()), key=TIERS.index, default="disk")
            if self._told.get(digest, "disk") == tier:
                continue
            if tier == "disk":
                del self._told[digest]
            else:
                self._told[digest] = tier
            if self.on_residency is not None:
                self.on_residency(digest, tier)
