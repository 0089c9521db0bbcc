"""Measurements of a running engine: whole workloads, single decode steps, and how busy the GPU is meanwhile."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch

from server.engine.config import EngineStats
from server.engine.sequence import Output, Request
from server.engine.workload import Workload

Clock = Callable[[], float]

PROFILER_EVENTS = ("Activity Buffer Request", "Buffer Flush", "Command Buffer Full", "Instrumentation", "Resource")
"""What CUPTI reports of itself beside what runs on the GPU."""


class BenchError(RuntimeError):
    """A measurement that would not mean what it says."""


class Steps(Protocol):
    """The part of the engine that is measured."""

    @property
    def has_work(self) -> bool: ...

    def add_request(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def step(self) -> list[Output]: ...

    def stats(self) -> EngineStats: ...


@dataclass
class Served:
    """One workload from the first arrival to the last token. Times are seconds.

    ttft: from the moment at which a request was due, to its first token; warm: those of it whose adapters were on the
    device when it came. gaps: between tokens of one request.
    """

    elapsed: float = 0.0
    output_tokens: int = 0
    steps: int = 0
    token_rows: int = 0
    loads: int = 0
    evictions: int = 0
    preemptions: int = 0
    ttft: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.elapsed


def serve(
    engine: Steps,
    workload: Workload,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    is_warm: Callable[[Request], bool] = lambda _: True,
) -> Served:
    """Run a workload, adding every request when it is due. Raises BenchError unless every request gave all its tokens.

    Arrivals do not wait for answers, and a request that was due while a step ran has waited since it was due.
    """
    before = engine.stats()
    pending = deque(zip(workload.arrivals, workload.requests, strict=True))
    times: dict[str, list[float]] = defaultdict(list)
    warm: set[str] = set()
    start = clock()
    while pending or engine.has_work:
        now = clock() - start
        while pending and pending[0][0] <= now:
            request = pending.popleft()[1]
            if is_warm(request):
                warm.add(request.id)
            engine.add_request(request)
        if not engine.has_work:
            sleep(max(0.0, pending[0][0] - now))
            continue
        outputs = engine.step()
        now = clock() - start
        for output in _sound(outputs):
            times[output.request_id] += [now] * len(output.tokens)
    served = _counted(engine, before, clock() - start)
    for due, request in zip(workload.arrivals, workload.requests, strict=True):
        own = times[request.id]
        if len(own) != request.params.max_tokens:
            raise BenchError(f"{request.id} gave {len(own)} tokens, expected {request.params.max_tokens}")
        served.output_tokens += len(own)
        served.ttft.append(own[0] - due)
        if request.id in warm:
            served.warm.append(served.ttft[-1])
        served.gaps += [after - earlier for earlier, after in pairwise(own)]
    return served


def _counted(engine: Steps, before: EngineStats, elapsed: float) -> Served:
    after = engine.stats()
    return Served(
        elapsed,
        steps=len(after.steps),
        token_rows=sum(rows for _, rows in after.steps),
        loads=after.adapter_loads - before.adapter_loads,
        evictions=after.adapter_evictions - before.adapter_evictions,
        preemptions=after.preemptions - before.preemptions,
    )


def _sound(outputs: Iterable[Output]) -> Iterable[Output]:
    for output in outputs:
        if output.error is not None:
            raise BenchError(f"{output.request_id} failed: {output.error}")
        yield output


@dataclass(frozen=True)
class Decoded:
    """Steady decoding: seconds of every measured step, and how they were spent.

    context: mean tokens of a sequence in the middle of these steps.
    host: mean seconds a step outside of waiting for the device, None where nothing waits (CPU).
    busy: share of the time in which the GPU runs something, None without a GPU; `profiled` is the mean step meanwhile.
    """

    seconds: tuple[float, ...]
    context: float
    host: float | None
    busy: float | None
    profiled: float | None


def decode(engine: Steps, workload: Workload, *, warm: int, steps: int, profiled: int, cuda: bool) -> Decoded:
    """Prefill all requests, skip `warm` steps, then time `steps` calls in which every request gets one token.

    The GPU's share comes from `profiled` further steps under torch.profiler, whose own cost slows them: compare
    `Decoded.profiled` with the undisturbed steps. Raises BenchError if a step gave other than one token a request.
    """
    names = [request.id for request in workload.requests]
    for request in workload.requests:
        engine.add_request(request)
    waiting, produced = set(names), workload.prompt_tokens
    while waiting:
        outputs = engine.step()
        waiting -= {output.request_id for output in _sound(outputs) if output.tokens}
        produced += sum(len(output.tokens) for output in outputs)
    for _ in range(warm):
        engine.step()
    waits, seconds = DeviceWaits(), []
    with waits:
        for _ in range(steps):
            started = time.perf_counter()
            outputs = engine.step()
            seconds.append(time.perf_counter() - started)
            if sum(len(output.tokens) for output in _sound(outputs)) != len(names):
                raise BenchError(
                    f"a step gave {len(outputs)} outputs, expected a token for each of {len(names)} requests"
                )
    busy, mean = profile(engine.step, profiled) if cuda and profiled else (None, None)
    for name in names:
        engine.abort(name)
    while engine.has_work:
        engine.step()
    engine.stats()
    host = (sum(seconds) - waits.seconds) / steps if cuda else None
    context = produced / len(names) + warm + steps / 2
    return Decoded(tuple(seconds), context, host, busy, mean)


class DeviceWaits:
    """Counts the seconds that Python spends waiting for the GPU in events, streams and `torch.cuda.synchronize`.

    Waits hidden in `.item()` or `.tolist()` of device tensors are not seen and count as work of the host.
    """

    PLACES = ((torch.cuda.Event, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda, "synchronize"))

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        self._originals: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Self:
        for owner, name in self.PLACES:
            original = getattr(owner, name)
            self._originals.append((owner, name, original))
            setattr(owner, name, self._timed(original))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while self._originals:
            setattr(*self._originals.pop())

    def _timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started, self._depth = time.perf_counter(), self._depth + 1
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:  # one wait may call another
                    self.seconds += time.perf_counter() - started

        return timed


def profile(step: Callable[[], object], count: int) -> tuple[float, float]:
    """(share of the time in which at least one kernel or copy runs on the GPU, mean seconds a step) of `count` steps.

    Both on the device's own clock, from its first event to its last; the share without the first quarter, in which the
    profiler asks for its buffers.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in trace.events() or ()
        if event.device_type.name == "CUDA" and event.name not in PROFILER_EVENTS
    ]
    if not spans:
        raise BenchError("the profiler saw nothing run on the GPU")
    first, last = min(spans)[0], max(end for _, end in spans)
    return covered(spans, first + (last - first) / 4, last), (last - first) * 1e-6 / count


def covered(spans: Iterable[tuple[float, float]], begin: float, end: float) -> float:
    """Share of [begin, end] that lies within at least one span."""
    total, reached = 0.0, begin
    for start, stop in sorted(spans):
        total += max(0.0, min(stop, end) - max(start, reached))
        reached = max(reached, min(stop, end))
    return total / (end - begin)


def percentile(values: Iterable[float], share: float) -> float:
    """Linear between neighbours; NaN for none."""
    known = list(values)
    return float(np.percentile(known, share)) if known else float("nan")
