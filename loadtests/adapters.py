"""What adapters cost that come, wait and go: `python -m loadtests.adapters --model FOLDER --out result.json`.

Three servers, one after the other: one that has memory for some of the adapters only (registration, first token of an
adapter that is resident or in host memory), one that has hardly any (first token from disk), and one with very many
(start-up, lists, memory of the front end). The last line printed is one JSON document.
"""

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from loadtests.process import ServerProcess
from loadtests.random_adapter import LinearSizes, write_adapter
from loadtests.spread import spread
from loadtests.upload import upload

Json = dict[str, Any]
RANK = 16
LARGE = 8
"""Rank-16 adapters on all seven linears; the first server has pages for half of them."""
PROMPT_TOKENS = 16
UPLOADS = 8
"""Registrations at once of the many small adapters."""


def main(arguments: Sequence[str] | None = None) -> Json:
    """Measure, print a table, and write the JSON document to `--out`."""
    asked = _parser().parse_args(arguments)
    sizes = LinearSizes.of(asked.model)
    document: Json = {
        "bench": "adapters",
        "model": asked.model.name,
        "machine": platform.processor() or platform.machine(),
        "rank": RANK,
        "arguments": {"count": asked.count, "repeats": asked.repeats},
    }
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as name:
        work = Path(name)
        folders = [write_adapter(work / f"large-{index}", sizes, RANK, seed=index) for index in range(LARGE)]
        document["bytes"] = sum(file.stat().st_size for file in folders[0].iterdir())
        document |= _tiers(asked.model, work, folders, asked.repeats)
        document |= _many(asked.model, work, sizes, asked.count)
    for key, value in document.items():
        print(f"{key}: {value}")
    line = json.dumps(document)
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(line)
    return document


def _tiers(model: Path, work: Path, folders: Sequence[Path], repeats: int) -> Json:
    """Milliseconds of a registration, and to the first token by where the adapter is."""
    size = sum(file.stat().st_size for file in folders[0].iterdir())
    names = [folder.name for folder in folders]
    half = str(size * LARGE // 2 + (1 << 20))
    options = ("--encoder", "none", "--page-memory", half, "--max-model-len", "1024")
    with ServerProcess(model, work / "data", *options) as server, server.client() as client:
        registered = [_timed(partial(upload, client, folder.name, folder)) for folder in folders]
        _first_tokens(client, names)
        host = _first_tokens(client, names * repeats)
        resident = _first_tokens(client, [names[0]] * (1 + repeats * LARGE))[1:]
    two = str(2 * size + (1 << 20))
    tight = ("--encoder", "none", "--page-memory", two, "--host-memory", two, "--max-model-len", "1024")
    with ServerProcess(model, work / "data", *tight) as server, server.client() as client:
        unverified = _first_tokens(client, names)
        disk = _first_tokens(client, names * repeats)
    return {
        "registration_ms": spread(registered),
        "first_token_resident_ms": spread(resident),
        "first_token_host_ms": spread(host),
        "first_token_disk_ms": spread(disk),
        "first_token_after_restart_ms": spread(unverified),
        "host_above_resident_ms": statistics.median(host) - statistics.median(resident),
        "disk_above_resident_ms": statistics.median(disk) - statistics.median(resident),
    }


def _many(model: Path, work: Path, sizes: LinearSizes, count: int) -> Json:
    """Start-up, lists and the front end's memory, with `count` small adapters and with none."""
    data, small = work / "many", ("--encoder", "none", "--max-model-len", "1024", "--page-memory", "64MiB")
    with ServerProcess(model, data, *small) as server, server.client() as client:
        _lists(client)
        empty, empty_start = server.resident_bytes(), server.seconds
        started = time.perf_counter()
        with ThreadPoolExecutor(UPLOADS) as threads:
            list(threads.map(lambda index: _upload_small(client, work, sizes, index), range(count)))
        rate = count / (time.perf_counter() - started)
    with ServerProcess(model, data, *small) as server, server.client() as client:
        started_full = server.seconds
        idle = server.resident_bytes()
        lists = _lists(client)
    return {
        "adapters": count,
        "registrations_per_second": rate,
        "start_empty_s": empty_start,
        "start_full_s": started_full,
        "idle_bytes_each": (idle - empty) / count,
        **lists,
    }


def _lists(client: httpx.Client) -> Json:
    """Milliseconds of the lists."""
    paths = {
        "models_all_ms": "/v1/models",
        "models_page_ms": "/v1/models?limit=100",
        "adapters_page_ms": "/admin/v1/adapters?limit=100",
    }
    found: Json = {}
    for name, path in paths.items():
        found[name] = statistics.median(_timed(partial(_get, client, path)) for _ in range(5))
    return found


def _first_tokens(client: httpx.Client, names: Iterable[str]) -> list[float]:
    """Milliseconds to the first token of one request after the other, each with a prompt of its own."""
    seeds = itertools.count(time.time_ns() % (1 << 20))
    return [_timed(partial(_first_token, client, name, next(seeds))) for name in names]


def _first_token(client: httpx.Client, name: str, seed: int) -> None:
    prompt = [(seed * 7919 + position * 104729) % 40_000 + 100 for position in range(PROMPT_TOKENS)]
    body = {"model": name, "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    answer = client.post("/v1/completions", json=body)
    answer.raise_for_status()


def _upload_small(client: httpx.Client, work: Path, sizes: LinearSizes, index: int) -> None:
    folder = write_adapter(work / f"small-{index % (4 * UPLOADS)}-{index}", sizes, 1, index, ("q_proj",), layers=1)
    upload(client, f"small-{index}", folder)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def _get(client: httpx.Client, path: str) -> None:
    client.get(path).raise_for_status()


def _timed(act: Callable[[], None]) -> float:
    started = time.perf_counter()
    act()
    return (time.perf_counter() - started) * 1e3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests.adapters", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--count", type=int, default=10_000, help="small adapters [10000]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser


if __name__ == "__main__":
    main()
