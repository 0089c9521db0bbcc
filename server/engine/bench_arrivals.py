"""What the engine's benchmark measures while requests arrive one by one."""

from server.engine.bench_measure import Served, percentile, serve
from server.engine.bench_scenarios import Json, add_loss
from server.engine.bench_session import Session, Setup
from server.engine.engine import Engine
from server.engine.peers import ENGINE_OFF
from server.engine.sequence import Request
from server.engine.workload import Traffic, gamma_arrivals, make_workload, popular

MANY_LOADS = (1.1, 0.75)
"""Rates of `many_adapters` over the base model's saturating rate: some requests always wait, and none has to."""


def latency(session: Session) -> Json:
    """Poisson arrivals at shares of the rate that saturates the engine with the same traffic."""
    options = session.options
    labels = [label for label in options.traffic if label != ENGINE_OFF and not label.startswith("mix")]
    rows = [row for label in labels for row in _latency(session, Traffic.parse(label))]
    return {"scenario": "latency", "concurrency": options.concurrency, "rows": rows}


def _latency(session: Session, traffic: Traffic) -> list[Json]:
    options, rows = session.options, []
    engine = session.engine(Setup(options.concurrency, session.most_adapters))
    saturating = session.saturating_rate(engine, traffic)
    serve(engine, session.warm_up(traffic), session.clock)
    for load in options.loads:
        rate = saturating * load
        count = max(8, round(rate * options.seconds))
        arrivals = gamma_arrivals(count, rate, options.seed)
        work = session.workload("latency", traffic, session.lengths(count), arrivals)
        row = {
            "traffic": traffic.label,
            "load": load,
            "requests": count,
            "requests_per_second": rate,
            **_latencies(serve(engine, work, session.clock)),
        }
        session.say(f"latency {traffic.label} at {load:.0%}: first token p99 {row['ttft_p99_ms']:.0f} ms")
        rows.append(row)
    return rows


def _latencies(served: Served) -> Json:
    return {
        "ttft_p50_ms": percentile(served.ttft, 50) * 1e3,
        "ttft_p99_ms": percentile(served.ttft, 99) * 1e3,
        "gap_p50_ms": percentile(served.gaps, 50) * 1e3,
        "gap_p99_ms": percentile(served.gaps, 99) * 1e3,
    }


def many_adapters(session: Session) -> Json:
    """The synthetic workload of S-LoRA (Sheng et al. 2023): gamma arrivals, power-law popularity.

    Adapters on q_proj and v_proj, all in host memory, pages on the device for fewer. Exponent 1 is the paper's alpha of
    1 in the usual sense; exponent 0, uniform, is what the paper's published generator makes of it. Base traffic with
    the same arrivals and lengths stands beside them, above the saturating rate and below it.
    """
    options = session.options
    setup = Setup(options.concurrency, options.device_adapters, targets=("q_proj", "v_proj"), num_sets=8)
    engine = session.engine(setup)
    rate = session.saturating_rate(engine, Traffic.parse("0"))
    for index in range(options.many):
        engine.adapters.read_now(session.adapters.digest(index), session.adapters.path(index))
    rows = []
    for load in MANY_LOADS:
        own = [_many(session, setup, load, load * rate, exponent) for exponent in (None, 1.0, 0.0)]
        add_loss(own, "tokens_per_second", higher=True)
        rows += own
    pages = dict(engine.info().num_pages)
    return {"scenario": "many_adapters", "rank": options.rank, "host": options.many, "pages": pages, "rows": rows}


def _many(session: Session, setup: Setup, load: float, rate: float, exponent: float | None) -> Json:
    """`exponent` None: the base model."""
    options, engine = session.options, session.engine(setup)
    count = max(8, round(rate * options.seconds * 2))
    chosen = [] if exponent is None else popular(count, options.many, exponent, options.seed)
    mixes = [session.adapters.mix([index], [1.0]) for index in chosen] or [session.adapters.mix([], [])] * count
    work = make_workload(
        f"many-{exponent}",
        session.lengths(count),
        mixes,
        session.adapters,
        vocab_size=session.shape.vocab_size,
        seed=options.seed,
        arrivals=gamma_arrivals(count, rate, options.seed),
        num_adapters=options.many,
    )
    served = serve(engine, work, session.clock, is_warm=lambda request: _is_warm(engine, request))
    label = "0" if exponent is None else f"power {exponent:g}"
    session.say(
        f"many_adapters {label} at {load:.0%}: {served.tokens_per_second:,.0f} output tokens/s, {served.loads} loads"
    )
    return {
        "traffic": label,
        "load": load,
        "adapters": len(set(chosen)),
        "requests": count,
        "requests_per_second": rate,
        "tokens_per_second": served.tokens_per_second,
        "loads": served.loads,
        "evictions": served.evictions,
        **_latencies(served),
        "warm": len(served.warm),
        "ttft_warm_p99_ms": percentile(served.warm, 99) * 1e3 if served.warm else None,
    }


def _is_warm(engine: Engine, request: Request) -> bool:
    return all(engine.adapters.residency(digest) == "device" for digest in request.mix.digests)
