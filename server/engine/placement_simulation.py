"""Engines that are only counts: rows, pages for so many adapters, and a queue. Shows what a placement does to them.

An engine starts what waits in order of arrival, but passes over what finds no page free, as the scheduler does. An
adapter is brought when a request for it starts, drives out the one that was least recently used, and stays while it is
in use. Residency is reported as it changes, as engines do from step to step.
"""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.engine.placement import Placement, Wanted

Choose = Callable[[str, Sequence[int]], int]
"""(digest, loads) -> engine"""


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, in seconds, for which adapter, and how long it computes once its adapter is there."""

    at: float
    digest: str
    seconds: float


@dataclass
class Outcome:
    """Of each request whether it found its adapter there or on its way, how long it waited, in seconds, and how far the
    most loaded engine was above the mean when it came, as a ratio.
    """

    hits: list[bool] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    imbalances: list[float] = field(default_factory=list)


class SimulatedEngine:
    """`moved` is told of adapters that come to the device or leave it."""

    def __init__(self, rows: int, pages: int, load_seconds: float, moved: Callable[[str, str], None]) -> None:
        self.requests = 0
        self._rows = rows
        self._pages = pages
        self._load_seconds = load_seconds
        self._moved = moved
        self._running = 0
        self._waiting: OrderedDict[int, Arrival] = OrderedDict()
        self._resident: OrderedDict[str, None] = OrderedDict()  # the least recently used first
        self._using: Counter[str] = Counter()

    @property
    def free_pages(self) -> int:
        return self._pages - len(self._resident)

    def add(self, number: int, arrival: Arrival) -> None:
        self.requests += 1
        self._waiting[number] = arrival

    def end(self, arrival: Arrival) -> None:
        self.requests -= 1
        self._running -= 1
        self._using[arrival.digest] -= 1

    def start(self) -> list[tuple[int, Arrival, bool, float]]:
        """What starts now: number, arrival, whether the adapter was there, and seconds until the end."""
        started = []
        for number, arrival in list(self._waiting.items()):
            if self._running == self._rows:
                break
            hit = arrival.digest in self._resident
            if not hit and not self._make_room():
                continue
            del self._waiting[number]
            self._running += 1
            self._using[arrival.digest] += 1
            self._resident[arrival.digest] = None
            self._resident.move_to_end(arrival.digest)
            if not hit:
                self._moved(arrival.digest, "device")
            started.append((number, arrival, hit, arrival.seconds + self._load_seconds * (not hit)))
        return started

    def _make_room(self) -> bool:
        if self.free_pages:
            return True
        victim = next((digest for digest in self._resident if not self._using[digest]), None)
        if victim is None:
            return False
        del self._resident[victim]
        self._moved(victim, "host")
        return True


class Placed:
    """The placement, told of what it is told of in a pool."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement

    def choose(self, digest: str, loads: Sequence[int]) -> int:
        return self.placement.choose(Wanted((digest,)), range(len(loads)))


def simulate(
    arrivals: Sequence[Arrival],
    engines: int,
    rows: int,
    pages: int,
    load_seconds: float,
    choose: Choose,
    placement: Placement | None = None,
) -> Outcome:
    """Let the requests come, be placed by `choose`, and end. A `placement` is told of all of it."""

    def moved(engine: int) -> Callable[[str, str], None]:
        return lambda digest, tier: placement.moved(engine, digest, tier) if placement is not None else None

    pool = [SimulatedEngine(rows, pages, load_seconds, moved(number)) for number in range(engines)]
    outcome = Outcome()
    endings: list[tuple[float, int, int, Arrival]] = []

    def start(engine: int, now: float) -> None:
        for number, arrival, hit, seconds in pool[engine].start():
            outcome.hits.append(hit)
            outcome.waits.append(now - arrival.at)
            heapq.heappush(endings, (now + seconds, number, engine, arrival))
        if placement is not None:
            placement.reported(engine, 0, pool[engine].free_pages)

    def end_until(now: float) -> None:
        while endings and endings[0][0] <= now:
            at, _, engine, arrival = heapq.heappop(endings)
            pool[engine].end(arrival)
            if placement is not None:
                placement.end(Wanted((arrival.digest,)), engine)
            start(engine, at)

    for number, arrival in enumerate(arrivals):
        end_until(arrival.at)
        loads = [each.requests for each in pool]
        engine = choose(arrival.digest, loads)
        if placement is not None:
            placement.begin(Wanted((arrival.digest,)), engine)
        pool[engine].add(number, arrival)
        loads[engine] += 1
        outcome.imbalances.append(max(loads) * engines / sum(loads))
        start(engine, arrival.at)
    end_until(float("inf"))
    return outcome


def clairvoyant_hits(digests: Sequence[str], pages: int) -> float:
    """Share of requests that find their adapter if who is driven out is always the one needed last (Belady, 1966)."""
    following: list[int] = [0] * len(digests)
    last: dict[str, int] = {}
    for index in range(len(digests) - 1, -1, -1):
        following[index] = last.get(digests[index], len(digests) + index)
        last[digests[index]] = index
    resident: dict[str, int] = {}
    queue: list[tuple[int, str]] = []
    hits = 0
    for index, digest in enumerate(digests):
        if digest in resident:
            hits += 1
        elif len(resident) == pages:
            while True:
                due, victim = heapq.heappop(queue)
                if resident.get(victim) == -due:
                    del resident[victim]
                    break
        resident[digest] = following[index]
        heapq.heappush(queue, (-following[index], digest))
    return hits / len(digests)
