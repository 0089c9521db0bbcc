"""What embedding costs: `python -m routing.bench_encoder --model FOLDER`. The last line of stdout is JSON.

One text at a time, then so many callers at once, each with its next text as soon as it has the last one's vector. No
text comes twice, so that nothing is remembered.
"""

import argparse
import asyncio
import json
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from routing.encoder import EncoderProcess, ServedEncoder

Clock = Callable[[], float]
WORDS = (
    "the",
    "of",
    "what",
    "is",
    "in",
    "translate",
    "sentence",
    "question",
    "number",
    "which",
    "city",
    "write",
    "short",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. Times in milliseconds of one text as its caller sees them."""

    threads: int
    words: int
    callers: int
    texts: int
    texts_per_second: float
    p50_ms: float
    p95_ms: float


def texts(count: int, words: int, seed: int) -> list[str]:
    """Texts of `words` common words each, no two alike."""
    chosen = random.Random(seed)
    return [" ".join([*(chosen.choice(WORDS) for _ in range(words - 1)), str(number)]) for number in range(count)]


async def measure(
    encoder: ServedEncoder, given: Sequence[str], callers: int, clock: Clock
) -> tuple[float, list[float]]:
    """Seconds in all, and those of every text."""
    waiting = iter(given)
    times: list[float] = []

    async def call() -> None:
        for text in waiting:
            started = clock()
            await encoder.embed([text])
            times.append(clock() - started)

    started = clock()
    await asyncio.gather(*(call() for _ in range(callers)))
    return clock() - started, times


async def run(
    folder: Path, device: str, threads: Sequence[int], words: Sequence[int], callers: Sequence[int], count: int
) -> list[Row]:
    """All combinations, each process warmed up first."""
    rows: list[Row] = []
    for number in threads:
        process = EncoderProcess(folder, device=device, num_threads=number)
        try:
            encoder = process.encoder()
            await encoder.embed([f"warm-up {index}" for index in range(64)])
            for length in words:
                for at_once in callers:
                    given = texts(max(count, at_once), length, seed=len(rows))
                    elapsed, times = await measure(encoder, given, at_once, time.perf_counter)
                    p50, p95 = np.percentile(times, (50, 95)) * 1e3
                    rate = len(given) / elapsed
                    rows.append(Row(number, length, at_once, len(given), rate, float(p50), float(p95)))
                    print(_line(rows[-1]), flush=True)
        finally:
            await process.close()
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and JSON."""
    parser = argparse.ArgumentParser(description="Measure the encoder process.")
    parser.add_argument("--model", type=Path, required=True, help="a sentence-transformers folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=_numbers, default=(1, 2))
    parser.add_argument("--words", type=_numbers, default=(20, 100), help="words of a text")
    parser.add_argument("--callers", type=_numbers, default=(1, 8, 64))
    parser.add_argument("--texts", type=int, default=256, help="texts of one measurement")
    asked = parser.parse_args(arguments)
    print("| threads | words | callers | texts/s | p50 ms | p95 ms |\n|---|---|---|---|---|---|", flush=True)
    rows = asyncio.run(run(asked.model, asked.device, asked.threads, asked.words, asked.callers, asked.texts))
    libraries = {name: version(name) for name in ("torch", "transformers", "sentence-transformers")}
    setup = {"model": asked.model.name, "device": asked.device, "machine": platform.machine(), **libraries}
    print(json.dumps({"setup": setup, "rows": [asdict(row) for row in rows]}))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _line(row: Row) -> str:
    return (
        f"| {row.threads} | {row.words} | {row.callers} | {row.texts_per_second:.1f} "
        f"| {row.p50_ms:.1f} | {row.p95_ms:.1f} |"
    )


if __name__ == "__main__":
    main()
