"""What decoding rows notice of adapters that are brought to the device beside them."""

from collections.abc import Callable, Iterator
from itertools import cycle

from server.engine.bench_measure import decode, percentile
from server.engine.bench_scenarios import Json
from server.engine.bench_session import Session, Setup
from server.engine.config import EngineStats
from server.engine.engine import Engine
from server.engine.sequence import Output, Request
from server.engine.workload import Lengths, Traffic

RATES = (0.0, 100.0, 400.0)
"""Adapters a second."""
HOST_ADAPTERS = 256


class LoadingEngine:
    """An engine whose every step first asks for the adapters that are due. `load` brings the next one."""

    def __init__(self, engine: Engine, rate: float, load: Callable[[], None], clock: Callable[[], float]) -> None:
        self._engine = engine
        self._rate = rate
        self._load = load
        self._clock = clock
        self._started = clock()
        self._asked = 0

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def add_request(self, request: Request) -> None:
        self._engine.add_request(request)

    def abort(self, request_id: str) -> None:
        self._engine.abort(request_id)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def step(self) -> list[Output]:
        while self._asked < (self._clock() - self._started) * self._rate:
            self._asked += 1
            self._load()
        return self._engine.step()


def loads(session: Session) -> Json:
    """Steady decoding of rows with adapters of their own while others come from host memory, so many a second."""
    options = session.options
    traffic = Traffic.parse("8")
    engine = session.engine(Setup(options.concurrency, 64, targets=("q_proj", "v_proj"), num_sets=8))
    for index in range(HOST_ADAPTERS):
        engine.adapters.read_now(session.adapters.digest(index), session.adapters.path(index))
    others: Iterator[int] = cycle(range(traffic.adapters, HOST_ADAPTERS))

    def load() -> None:
        index = next(others)
        engine.adapters.prefetch(session.adapters.digest(index), session.adapters.path(index), lambda _: None)

    rows = [_beside(session, traffic, engine, rate, load) for rate in RATES]
    for row in rows:
        row["slower"] = row["ms"] / rows[0]["ms"] - 1
    return {"scenario": "loads", "rank": options.rank, "adapter_mb": session.adapters.num_bytes / 1e6, "rows": rows}


def _beside(session: Session, traffic: Traffic, engine: Engine, rate: float, load: Callable[[], None]) -> Json:
    options = session.options
    prompt = max(1, options.context - options.warm - options.steps // 2)
    lengths = Lengths.constant(options.concurrency, prompt, session.longest - prompt)
    work = session.workload(f"loads-{rate:g}", traffic, lengths)
    before = engine.runner.pool.counters.loads
    loading = LoadingEngine(engine, rate, load, session.clock)
    started = session.clock()
    done = decode(loading, work, warm=options.warm, steps=options.steps, profiled=0, cuda=session.cuda)
    seconds = session.clock() - started
    session.say(f"loads {rate:g}/s: {percentile(done.seconds, 50) * 1e3:.3f} ms a step")
    return {
        "rate": rate,
        "loads_per_second": (engine.runner.pool.counters.loads - before) / seconds,
        "ms": percentile(done.seconds, 50) * 1e3,
        "ms_p90": percentile(done.seconds, 90) * 1e3,
        "ms_p99": percentile(done.seconds, 99) * 1e3,
    }
