"""Engines that are only counts: rows, pages for so many adapters, KV blocks, and a queue. Shows what a placement does
to them.

An engine starts what waits in order of arrival, but passes over what finds no page free, as the scheduler does. An
adapter is brought when a request for it starts, drives out the one that was least recently used, and stays while it is
in use. Residency is reported as it changes, as engines do from step to step. Blocks of KV stay, whoever computed them,
until their room is needed: the least recently used first, of one request the last ones first.
"""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from server.engine.placement import Placement, Wanted
from server.engine.prefixes import Prefixes

Choose = Callable[[Wanted, Sequence[int]], int]
"""(what is wanted near, loads) -> engine"""


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, in seconds, for which adapter, and how long it computes once its adapter and its
    prompt's KV are there.

    `blocks` name the KV blocks of its prompt, the first `prompt_blocks` of them, and of its answer: one name wherever
    the beginnings up to there are equal. `prefixes` are those of its prompt.
    """

    at: float
    digest: str
    seconds: float
    blocks: tuple[int, ...] = ()
    prompt_blocks: int = 0
    prefixes: Prefixes = ()

    @property
    def wanted(self) -> Wanted:
        return Wanted((self.digest,), self.prefixes)


@dataclass(frozen=True)
class EngineSize:
    """`pages` in adapters; `load_seconds` an adapter's way to the device, `block_seconds` the computation of a block of
    a prompt.
    """

    rows: int
    pages: int
    load_seconds: float
    blocks: int = 0
    block_seconds: float = 0.0

    def times(self, number: int) -> "EngineSize":
        """One engine with the room of so many."""
        return replace(self, rows=number * self.rows, pages=number * self.pages, blocks=number * self.blocks)


@dataclass
class Outcome:
    """Of each request, in the order of their starts, whether it found its adapter there or on its way, how many blocks
    of its prompt it found and had, and how long it waited, in seconds; and in the order of arrival how far the most
    loaded engine was above the mean when it came, as a ratio.
    """

    hits: list[bool] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    imbalances: list[float] = field(default_factory=list)


class SimulatedEngine:
    """`moved` is told of adapters that come to the device or leave it."""

    def __init__(self, size: EngineSize, moved: Callable[[str, str], None]) -> None:
        self.requests = 0
        self._size = size
        self._moved = moved
        self._kept: OrderedDict[int, None] = OrderedDict()  # blocks, the least recently used first
        self._running = 0
        self._waiting: OrderedDict[int, Arrival] = OrderedDict()
        self._resident: OrderedDict[str, None] = OrderedDict()  # the least recently used first
        self._using: Counter[str] = Counter()

    @property
    def free_pages(self) -> int:
        return self._size.pages - len(self._resident)

    def add(self, number: int, arrival: Arrival) -> None:
        self.requests += 1
        self._waiting[number] = arrival

    def end(self, arrival: Arrival) -> None:
        self.requests -= 1
        self._running -= 1
        self._using[arrival.digest] -= 1
        self._keep(arrival.blocks)

    def start(self) -> list["Started"]:
        """What starts now."""
        started = []
        for number, arrival in list(self._waiting.items()):
            if self._running == self._size.rows:
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
            cached = self._cached(arrival)
            self._keep(arrival.blocks[: arrival.prompt_blocks])
            before = self._size.load_seconds * (not hit) + self._size.block_seconds * (arrival.prompt_blocks - cached)
            started.append(Started(number, arrival, hit, cached, before + arrival.seconds))
        return started

    def _cached(self, arrival: Arrival) -> int:
        """Blocks of the prompt that are there; nothing is where one before it is not."""
        prompt = arrival.blocks[: arrival.prompt_blocks]
        return next((place for place, block in enumerate(prompt) if block not in self._kept), len(prompt))

    def _keep(self, blocks: Sequence[int]) -> None:
        for block in reversed(blocks):
            self._kept[block] = None
            self._kept.move_to_end(block)
        while len(self._kept) > self._size.blocks:
            self._kept.popitem(last=False)

    def _make_room(self) -> bool:
        if self.free_pages:
            return True
        victim = next((digest for digest in self._resident if not self._using[digest]), None)
        if victim is None:
            return False
        del self._resident[victim]
        self._moved(victim, "host")
        return True


@dataclass(frozen=True)
class Started:
    """A request by its number; whether its adapter and how many blocks of its prompt were there; `seconds` until its
    end.
    """

    number: int
    arrival: Arrival
    hit: bool
    cached: int
    seconds: float


class Placed:
    """The placement, told of what it is told of in a pool."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement

    def choose(self, wanted: Wanted, loads: Sequence[int]) -> int:
        return self.placement.choose(wanted, range(len(loads)))


def simulate(
    arrivals: Sequence[Arrival],
    engines: int,
    size: EngineSize,
    choose: Choose,
    placement: Placement | None = None,
) -> Outcome:
    """Let the requests come, be placed by `choose`, and end. A `placement` is told of all of it."""

    def moved(engine: int) -> Callable[[str, str], None]:
        return lambda digest, tier: placement.moved(engine, digest, tier) if placement is not None else None

    pool = [SimulatedEngine(size, moved(number)) for number in range(engines)]
    outcome = Outcome()
    endings: list[tuple[float, int, int, Arrival]] = []

    def start(engine: int, now: float) -> None:
        for each in pool[engine].start():
            outcome.hits.append(each.hit)
            outcome.cached.append(each.cached)
            outcome.prompts.append(each.arrival.prompt_blocks)
            outcome.waits.append(now - each.arrival.at)
            heapq.heappush(endings, (now + each.seconds, each.number, engine, each.arrival))
        if placement is not None:
            placement.reported(engine, 0, pool[engine].free_pages)

    def end_until(now: float) -> None:
        while endings and endings[0][0] <= now:
            at, _, engine, arrival = heapq.heappop(endings)
            pool[engine].end(arrival)
            if placement is not None:
                placement.end(arrival.wanted, engine)
            start(engine, at)

    for number, arrival in enumerate(arrivals):
        end_until(arrival.at)
        loads = [each.requests for each in pool]
        engine = choose(arrival.wanted, loads)
        if placement is not None:
            placement.begin(arrival.wanted, engine)
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
