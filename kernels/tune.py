"""Which products our kernel is at least as fast at as cuBLAS: measures candidates and makes the table of a GPU."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from torch.nn import functional

from kernels.bench_cases import Product, Where
from kernels.bench_timing import error, measure
from kernels.gemm_table import ROW_CLASSES, Choice, GemmConfig, GemmTable, candidates
from kernels.shapes import ModelShape

LARGEST_ERROR = 1e-2
FINALISTS = 3
MOST_WORKERS = 16

Key = tuple[int, int, int]


@dataclass(frozen=True)
class Tuning:
    """`each`: candidates that are tried a product. `tolerance`: by how much ours may be slower than cuBLAS and still be
    taken for steps without adapters.
    """

    each: int = 16
    tolerance: float = 0.01
    seconds: float = 120.0


@dataclass(frozen=True)
class Tuned:
    """Microseconds of the best candidate and of cuBLAS for (n, k, rows class), each with a norm before it.

    choice: None where no candidate ran.
    """

    key: Key
    choice: Choice | None
    triton: float
    cublas: float


def tune(shape: ModelShape, where: Where, tuning: Tuning, say: Callable[[str], None]) -> Iterator[Tuned]:
    """Measure every linear of a model and its head in every class of rows, until the time is up.

    What is not reached has no result; cuBLAS serves it. The candidates are compiled by several processes first.
    """
    end = time.monotonic() + tuning.seconds
    linears = [*shape.linears.values(), shape.head]
    tasks = {
        (linear.outputs, linear.inputs, rows): candidates(rows, linear.outputs, linear.inputs)[: tuning.each]
        for linear in linears
        for rows in ROW_CLASSES
    }
    started, wanted = time.monotonic(), sum(map(len, tasks.values()))
    compiled = compile_all(tasks, where, 0.7 * tuning.seconds)
    say(f"{len(compiled)} of {wanted} candidates run, compiled in {time.monotonic() - started:.0f} s")
    for linear in linears:
        product: Product | None = None
        for rows in ROW_CLASSES:
            if time.monotonic() > end:
                say(f"no time left for {linear.outputs} x {linear.inputs}, {rows} rows")
                continue
            product = Product(where.random(rows, linear.inputs), product.weights) if product else None
            product = product or Product.of(linear, rows, where)
            key = (linear.outputs, linear.inputs, rows)
            configs = [config for config in tasks[key] if (key, config) in compiled]
            tuned = _tune(product, configs, rows, where, tuning.tolerance)
            say(f"{tuned.key}: triton {tuned.triton:.1f} us, cuBLAS {tuned.cublas:.1f} us: {tuned.choice}")
            yield tuned


def _tune(product: Product, configs: list[GemmConfig], rows: int, where: Where, tolerance: float) -> Tuned:
    n, k = product.weights[0].shape
    expected = product.expected()
    right = [config for config in configs if _error(product, config, where, expected) <= LARGEST_ERROR]
    times = {config: _time(product, config, where, 7) for config in right}
    finalists = sorted(right, key=times.__getitem__)[:FINALISTS]
    times = {config: _time(product, config, where, 25) for config in finalists}
    cublas = _time(product, None, where, 25)
    choice = choose(times, cublas, tolerance)
    return Tuned((n, k, rows), choice, min(times.values(), default=float("nan")), cublas)


def choose(times: Mapping[GemmConfig, float], cublas: float, tolerance: float) -> Choice | None:
    """The fastest configuration, `alone` unless cuBLAS is faster by more than `tolerance`; None without any."""
    best = min(times, key=times.__getitem__, default=None)
    return None if best is None else Choice(best, times[best] <= cublas * (1 + tolerance))


def table_of(results: Iterable[Tuned], before: GemmTable) -> GemmTable:
    """`before` with new results over those of the same products."""
    return GemmTable({**before.entries, **{tuned.key: tuned.choice for tuned in results if tuned.choice}})


def _run(x: torch.Tensor, weight: torch.Tensor, config: GemmConfig | None, where: Where) -> torch.Tensor:
    from kernels.gemm import gemm

    return functional.linear(x, weight) if config is None else gemm(x, weight, None, config, pdl=where.pdl)


def _error(product: Product, config: GemmConfig, where: Where, expected: torch.Tensor) -> float:
    """Relative error; infinite for a configuration that the GPU refuses, for lack of shared memory say."""
    try:
        found = error(_run(product.x, product.weights[0], config, where), expected)
    except Exception:  # Triton's own errors have no base in common
        return float("inf")
    return found if found == found else float("inf")


def _time(product: Product, config: GemmConfig | None, where: Where, replays: int) -> float:
    """Median microseconds of a norm and the product after it: products follow small kernels in a layer, and start
    beside their ends where the GPU can do that."""
    from kernels.elementwise import rms_norm
    from kernels.gemm import gemm, new_counters

    norm, counters = where.random(product.x.shape[1]), new_counters(where.device)

    def run(i: int) -> torch.Tensor:
        x = rms_norm(product.x, norm, 1e-5, pdl=where.pdl)
        if config is None:
            return functional.linear(x, product.weights[i])
        return gemm(x, product.weights[i], None, config, counters=counters, pdl=where.pdl)

    return measure(run, len(product.weights), where.device, replays).p50


def compile_all(tasks: Mapping[Key, list[GemmConfig]], where: Where, seconds: float) -> set[tuple[Key, GemmConfig]]:
    """Run every candidate once, in as many processes as the machine has cores, which fills Triton's cache on disk.

    Returns those that ran: what fails, or takes longer than `seconds` in all, does so in a process that is not ours.
    """
    work = [(key, config) for key, configs in tasks.items() for config in configs]
    if where.device.type != "cuda":
        return set(work)
    workers, done = min(MOST_WORKERS, os.cpu_count() or 1), set()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(_compile, work[i::workers], where, seconds) for i in range(workers)]:
            with contextlib.suppress(BrokenProcessPool):
                done |= future.result()
    return done


def _compile(work: list[tuple[Key, GemmConfig]], where: Where, seconds: float) -> set[tuple[Key, GemmConfig]]:
    """Those of `work` that ran, in a process of its own."""
    end = time.monotonic() + seconds
    done = set()
    for (n, k, rows), config in work:
        if time.monotonic() > end:
            break
        weight = torch.empty(n, k, dtype=where.dtype, device=where.device)
        x = torch.zeros(rows, k, dtype=where.dtype, device=where.device)
        with contextlib.suppress(Exception):  # Triton's own errors have no base in common
            _run(x, weight, config, where)
            torch.cuda.synchronize()
            done.add(((n, k, rows), config))
    return done
