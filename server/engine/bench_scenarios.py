"""What the engine's benchmark measures with all requests at once. Every scenario gives a dict that JSON can hold."""

from collections.abc import Iterable
from typing import Any

import torch

from adapters_store.pages import page_bytes
from adapters_store.types import GROUPS
from server.engine import peers
from server.engine.bench_measure import Served, decode, percentile, serve
from server.engine.bench_session import Session, Setup
from server.engine.engine import Engine
from server.engine.sequence import Request
from server.engine.workload import Lengths, Traffic, Workload

Json = dict[str, Any]


def throughput(session: Session) -> Json:
    """Output tokens/s of every kind of traffic, best of the repeats."""
    rows = [_throughput(session, Traffic.parse(label)) for label in session.options.traffic]
    add_loss(rows, "tokens_per_second", higher=True)
    return {"scenario": "throughput", "concurrency": session.options.concurrency, "rows": rows}


def _throughput(session: Session, traffic: Traffic) -> Json:
    options = session.options
    pages = 0 if traffic.label == peers.ENGINE_OFF else session.most_adapters
    engine = session.engine(Setup(options.concurrency, pages))
    work = session.workload("throughput", traffic, session.lengths(options.requests))
    serve(engine, session.warm_up(traffic), session.clock)
    runs = []
    for repeat in range(options.repeats):
        runs.append(serve(engine, work, session.clock))
        speed = runs[-1].tokens_per_second
        session.say(f"throughput {traffic.label}, run {repeat + 1}: {speed:,.0f} output tokens/s")
    best = max(runs, key=lambda run: run.tokens_per_second)
    session.rates[traffic.label] = len(work.requests) / best.elapsed
    return _throughput_row(session, traffic, work, runs, best)


def _throughput_row(session: Session, traffic: Traffic, work: Workload, runs: list[Served], best: Served) -> Json:
    speeds = [run.tokens_per_second for run in runs]
    return {
        "traffic": traffic.label,
        "adapters": traffic.adapters,
        "requests": len(work.requests),
        "prompt_tokens": work.prompt_tokens,
        "output_tokens": best.output_tokens,
        "tokens_per_second": best.tokens_per_second,
        "runs": speeds,
        "spread": 1 - min(speeds) / max(speeds),
        "seconds": best.elapsed,
        "steps": best.steps,
        "token_rows": best.token_rows,
        "preemptions": best.preemptions,
        "loads": sum(run.loads for run in runs),
        "ratio": peers.ratio(best.tokens_per_second, traffic.label, session.options.model, session.device_name),
    }


def steady_decode(session: Session) -> Json:
    """Milliseconds of a decode step by rows and kind of traffic."""
    options = session.options
    results = []
    for count in options.rows:
        rows = [_decode(session, traffic, count) for traffic in _different(options.traffic, count)]
        add_loss(rows, "ms", higher=False)
        results += rows
    return {"scenario": "decode", "context": options.context, "steps": options.steps, "rows": results}


def _decode(session: Session, traffic: Traffic, count: int) -> Json:
    options = session.options
    engine = session.engine(Setup(max(count, options.concurrency), session.most_adapters))
    prompt = _prompt_length(session, count, engine.config.max_batch_tokens)
    lengths = Lengths.constant(count, prompt, session.longest - prompt)
    workload = session.workload(f"decode-{count}", traffic, lengths)
    make_resident(engine, workload.requests)
    done = decode(
        engine,
        workload,
        warm=options.warm,
        steps=options.steps,
        profiled=options.profiled,
        cuda=session.cuda,
    )
    mean = sum(done.seconds) / len(done.seconds)
    middle = percentile(done.seconds, 50) * 1e3
    session.say(f"decode {count} rows, {traffic.label}: {middle:.3f} ms a step")
    return {
        "rows": count,
        "traffic": traffic.label,
        "adapters": traffic.distinct(count),
        "context": done.context,
        "ms": middle,
        "ms_p10": percentile(done.seconds, 10) * 1e3,
        "ms_p90": percentile(done.seconds, 90) * 1e3,
        "steps_per_second": 1 / mean,
        "host_ms": None if done.host is None else done.host * 1e3,
        "host_share": None if done.host is None else done.host / mean,
        "gpu_busy": done.busy,
        "profiled_ms": None if done.profiled is None else done.profiled * 1e3,
    }


def make_resident(engine: Engine, requests: Iterable[Request]) -> None:
    """Bring all adapters of the requests to the device: prompts whose adapters come late would be decoded later too."""
    paths = {digest: request.paths[digest] for request in requests for digest in request.mix.digests}
    for digest, path in paths.items():
        engine.adapters.prefetch(digest, path, lambda _: None)
    while engine.adapters.busy:
        engine.step()


def _prompt_length(session: Session, rows: int, budget: int) -> int:
    """So long that the mean context is `Options.context` in the middle of the measured steps.

    Prompts take turns: rows * prompt / (budget - rows / 2) steps, during which the first rows decode already and the
    last do not, so that on average rows have decoded for half of them.
    """
    options = session.options
    half = rows / (2 * max(1.0, budget - rows / 2))
    return max(1, round((options.context - options.warm - options.steps / 2) / (1 + half)))


def _different(labels: tuple[str, ...], rows: int) -> list[Traffic]:
    """The kinds of traffic that differ from each other with so few rows; `off` differs in nothing here."""
    kinds = [Traffic.parse(label) for label in labels if label != peers.ENGINE_OFF]
    return list({(kind.distinct(rows), kind.per_request): kind for kind in reversed(kinds)}.values())[::-1]


def memory(session: Session) -> Json:
    """What an engine that chooses its own sizes plans to use, beside what it takes.

    `error` compares the driver's figure after some work with the plan and the weights. Under it, `started` and `served`
    are bytes taken by then: by torch's tensors (allocated), by its allocator (reserved) and on the device.
    """
    session.close()
    before = _used(session)
    engine = session.engine(Setup(session.options.concurrency, session.options.device_adapters, automatic=True))
    info, started = engine.info(), _used(session)
    most = max((Traffic.parse(label) for label in session.options.traffic), key=lambda kind: kind.adapters)
    serve(engine, session.warm_up(most), session.clock)
    served = _used(session)
    size, shape = session.dtype.itemsize, session.model.linear_shape
    groups = {group.name: group for group in GROUPS}
    planned = {
        "kv": info.num_kv_blocks * engine.runner.block_bytes(info.block_size),
        "pages": sum(pages * page_bytes(shape, groups[name], size) for name, pages in info.num_pages.items()),
        "weights": session.shape.num_parameters * size,
    }
    reported = {**dict.fromkeys(planned), **info.memory}
    total = sum(planned.get(kind, num_bytes or 0) for kind, num_bytes in reported.items())
    taken = {name: served[name] - before[name] for name in served}
    rows = [
        {"kind": kind, "planned": planned.get(kind, num_bytes), "reported": num_bytes}
        for kind, num_bytes in reported.items()
    ]
    return {
        "scenario": "memory",
        "rows": rows,
        "planned": total,
        "started": {name: started[name] - before[name] for name in started},
        "served": taken,
        "error": taken["device"] / total - 1 if taken else None,
    }


def _used(session: Session) -> dict[str, int]:
    if not session.cuda:
        return {}
    torch.cuda.synchronize()
    free, whole = torch.cuda.mem_get_info(session.device)
    allocated, reserved = torch.cuda.memory_allocated(session.device), torch.cuda.memory_reserved(session.device)
    return {"allocated": allocated, "reserved": reserved, "device": whole - free}


def add_loss(rows: list[Json], name: str, *, higher: bool) -> None:
    """1 - speed over the speed of the row whose traffic is `0`; None where there is none. `higher`: is better."""
    base = next((row[name] for row in rows if row["traffic"] == "0"), None)
    for row in rows:
        row["loss"] = None if base is None else 1 - (row[name] / base if higher else base / row[name])
