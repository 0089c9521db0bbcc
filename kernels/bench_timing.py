"""Timing of single operations on a GPU, apart from launches and from what the L2 cache remembers."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

COLD_BYTES = 160 << 20
"""Bytes that an operation rotates through: more than three times the L2 of an H100 (50 MiB)."""

COPY_BYTES = 1 << 30
MOST_ROTATIONS = 256
FEWEST_LAUNCHES = 16


@dataclass(frozen=True)
class Timing:
    """Microseconds of one launch: percentiles over replays of a graph of many."""

    p20: float
    p50: float
    p80: float


def rotations(touched_bytes: int) -> int:
    """Copies of an operation's inputs that no cache holds at once."""
    return max(1, min(MOST_ROTATIONS, -(-COLD_BYTES // max(1, touched_bytes))))


def measure(run: Callable[[int], object], copies: int, device: torch.device, replays: int = 25) -> Timing:
    """Time `run(i)`, i from 0 to `copies` - 1, launched one after the other in one CUDA graph.

    A launch costs what it costs within a graph of a decode step, the gap to its neighbour included. The current stream
    must not be the default one, which cannot be captured. Without a GPU: the time of calls, which says little.
    """
    launches = max(copies, FEWEST_LAUNCHES) if device.type == "cuda" else copies
    if device.type != "cuda":
        return _percentiles([_seconds(run, i % copies) for i in range(launches)])
    for i in range(copies):
        run(i)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()  # torch.cuda.graph would collect garbage each time: 50 ms of some hundred cases
    for i in range(launches):
        run(i % copies)
    graph.capture_end()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    graph.replay()
    for event in events[:-1]:
        event.record()
        graph.replay()
    events[-1].record()
    torch.cuda.synchronize(device)
    return _percentiles([begin.elapsed_time(end) * 1e-3 / launches for begin, end in pairwise(events)])


def measure_eagerly(run: Callable[[int], object], copies: int, device: torch.device, calls: int = 25) -> Timing:
    """Time `run(i)` as it comes, the work of the host and its waiting for the device included."""
    for i in range(min(copies, calls)):
        run(i)
    if device.type != "cuda":
        return _percentiles([_seconds(run, i % copies) for i in range(copies)])
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    for i, event in enumerate(events[:-1]):
        event.record()
        run(i % copies)
    events[-1].record()
    torch.cuda.synchronize(device)
    return _percentiles([begin.elapsed_time(end) * 1e-3 for begin, end in pairwise(events)])


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """One stream for all measurements: cuBLAS has a workspace for each, which must not be born within a graph."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def _seconds(run: Callable[[int], object], index: int) -> float:
    started = time.perf_counter()
    run(index)
    return time.perf_counter() - started


def _percentiles(seconds: list[float]) -> Timing:
    p20, p50, p80 = np.percentile(np.array(seconds) * 1e6, (20, 50, 80)).tolist()
    return Timing(p20, p50, p80)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of copying one large buffer to another: the floor that counts on this device.

    NaN without a GPU.
    """
    if device.type != "cuda":
        return float("nan")
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = measure(lambda _: target.copy_(source), 1, device)
    return 2 * COPY_BYTES / (timing.p50 * 1e-6)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """||out - expected|| / ||expected|| in fp32; NaN and inf stay what they are."""
    difference = torch.linalg.vector_norm(out.float() - expected.float())
    return float(difference / torch.linalg.vector_norm(expected.float()).clamp(min=1e-30))
