"""What HTTP adds to the first token: `python -m server.bench_first_token --model FOLDER`. The last line is JSON.

The engine without a model (server/engine/bench_paced.py) gives a request's first token as soon as it has the request,
so all the time until a client has it is the path's: HTTP, the template, tokens, two processes, detokenizing, an event.
Beside it run so many streams, read by another process. FOLDER has the tokenizer.
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from server.bench_front import BODIES, MODEL, WARM_SECONDS, Front, Json, request_bytes

QUANTILES = (10, 50, 90, 99)


def main(arguments: Sequence[str] | None = None) -> Json:
    """Measure, print a table and the JSON document."""
    parser = argparse.ArgumentParser(prog="python -m server.bench_first_token")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[0, 64])
    parser.add_argument("--rate", type=float, default=5000.0, help="tokens a second of all streams together")
    parser.add_argument("--requests", type=int, default=500)
    asked = parser.parse_args(arguments)
    rows: list[Json] = []
    print("path                 | streams |   p10 ms |   p50 ms |   p90 ms |   p99 ms")
    with Front(asked.model, asked.rate) as front:
        for path, body in BODIES.items():
            for streams in asked.streams:
                with busy(front, streams):
                    seconds = waits(front.port, path, body, asked.requests)
                told = {f"p{q}_ms": float(np.percentile(seconds, q)) * 1000 for q in QUANTILES}
                rows.append({"path": path, "streams": streams, **told})
                print(f"{path:20} | {streams:7} | " + " | ".join(f"{value:8.2f}" for value in told.values()))
    document = {"bench": "first_token", "rate": asked.rate, "requests": asked.requests, "rows": rows}
    print(json.dumps(document))
    return document


def waits(port: int, path: str, body: Json, count: int) -> list[float]:
    """Seconds from a request to its first event, over one connection, one after the other at times of no pattern."""
    request = request_bytes(path, body | {"model": MODEL, "stream": True, "max_tokens": 1})
    pauses = np.random.default_rng(0).uniform(0.0, 0.02, count)
    found = []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for pause in pauses:
            time.sleep(pause)
            started, read = time.perf_counter(), b""
            connection.sendall(request)
            while b"data: " not in read:
                read += connection.recv(1 << 16)
            found.append(time.perf_counter() - started)
            while not read.endswith(b"0\r\n\r\n"):
                read += connection.recv(1 << 16)
    return found


@contextmanager
def busy(front: Front, streams: int) -> Iterator[None]:
    """So many streams are read by another process, while the block lasts."""
    if not streams:
        yield
        return
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_read, args=(front.port, streams, ready.set), daemon=True)
    process.start()
    try:
        if not ready.wait(120):
            raise RuntimeError("the streams do not start")
        yield
    finally:
        process.terminate()
        process.join(30)


def _read(port: int, streams: int, ready: Callable[[], object]) -> None:
    (path, body), *_ = BODIES.items()
    request = request_bytes(path, body | {"model": MODEL, "stream": True, "max_tokens": 8000})

    async def read() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        while await reader.read(1 << 16):
            pass

    async def read_all() -> None:
        tasks = [asyncio.create_task(read()) for _ in range(streams)]
        await asyncio.sleep(WARM_SECONDS)
        ready()
        await asyncio.gather(*tasks)

    asyncio.run(read_all())


if __name__ == "__main__":
    main()
