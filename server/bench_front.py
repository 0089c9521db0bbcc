"""What the front end costs: `python -m server.bench_front --model FOLDER`. The last line printed is JSON.

A server without a model (server/engine/bench_paced.py gives the tokens) in a process of its own, real HTTP over
loopback, and the processor time of the server's process. The engine's process and the client are not counted. FOLDER
has the tokenizer. Beside the server as it is one by asyncio and h11; they take turns, and the best round counts.
"""

import argparse
import asyncio
import json
import logging
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TextIO, cast

from adapters_store.store import StoreConfig
from adapters_store.types import TARGETS, LinearShape
from server.app import create_app
from server.assembly import assemble
from server.chat import ChatTokenizer
from server.config import ServeSettings, Settings
from server.engine.client import EngineClient
from server.engine.config import EngineConfig
from server.logs import configure
from server.opening import open_store
from server.serve import Server, run, uvicorn_config

Json = dict[str, Any]
MODEL = "measured"
SHAPE = LinearShape(1, dict.fromkeys(TARGETS, 8), dict.fromkeys(TARGETS, 8))
SAID = "The quick brown fox jumps over the lazy dog. Hello world, this is a fine answer, and it goes on and on. "
WARM_SECONDS = 1.0
FORMS = {"as served": False, "asyncio, h11": True}
"""By name, whether uvicorn's plainest parts run the server."""
BODIES: dict[str, Json] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "What is the capital of France?"}]},
    "/v1/completions": {"prompt": "The capital of France is"},
}


def main(arguments: Sequence[str] | None = None) -> Json:
    """Measure, print a table and the JSON document."""
    parser = argparse.ArgumentParser(prog="python -m server.bench_front")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rate", type=float, default=5000.0, help="tokens a second of all streams together")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args(arguments)
    best: dict[tuple[str, str], Json] = {}
    with ExitStack() as stack:
        fronts = {form: stack.enter_context(Front(asked.model, asked.rate, plain)) for form, plain in FORMS.items()}
        for _ in range(asked.rounds):
            for path, body in BODIES.items():
                for form, front in fronts.items():
                    cost = asyncio.run(streamed(front, path, body, asked.streams, asked.seconds))
                    cost |= asyncio.run(answered(front, path, body, asked.requests))
                    best[path, form] = _better(best.get((path, form), cost), cost)
    rows = [{"path": path, "form": form, **cost} for (path, form), cost in best.items()]
    print("path                 | served by    | tokens/s | of a core | us a streamed token | us a request")
    for row in rows:
        print(
            f"{row['path']:20} | {row['form']:12} | {row['tokens_per_second']:8.0f} | {row['cores']:9.2f}"
            f" | {row['token_us']:19.1f} | {row['request_us']:12.0f}"
        )
    document = {"bench": "front", "streams": asked.streams, "rate": asked.rate, "rounds": asked.rounds, "rows": rows}
    print(json.dumps(document))
    return document


def _better(one: Json, other: Json) -> Json:
    """What streams took in the round in which a token took least, and a request wherever that took least."""
    return min(one, other, key=lambda cost: cost["token_us"]) | {
        "request_us": min(one["request_us"], other["request_us"])
    }


class Measured(Protocol):
    """A server on loopback, and the seconds that processors gave to it so far."""

    port: int

    @property
    def busy(self) -> float: ...


class Front:
    """A server in a process of its own, while the block lasts."""

    def __init__(self, folder: Path, rate: float, plain: bool = False) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._ready, self._stop = context.Event(), context.Event()
        self._process = context.Process(
            target=_serve,
            args=(self._listener, folder, rate, plain, self._ready.set, self._stop.wait),
            daemon=True,
        )

    def __enter__(self) -> "Front":
        self._process.start()
        if not self._ready.wait(120):
            raise RuntimeError("the server does not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._process.join(30)
        self._listener.close()

    @property
    def busy(self) -> float:
        """Seconds that the processors gave to the server's threads so far."""
        tasks = Path(f"/proc/{self._process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


class PacedClient(EngineClient):
    """Starts the engine that has no model."""

    def __init__(self, folder: Path, rate: float, tokens: Sequence[int]) -> None:
        super().__init__(EngineConfig(str(folder)))
        self.process.program = ("server.engine.bench_paced", str(rate), ",".join(map(str, tokens)))


def _serve(
    listener: socket.socket,
    folder: Path,
    rate: float,
    plain: bool,
    ready: Callable[[], object],
    stop: Callable[[], object],
) -> None:
    """The server's process."""

    def announce(_: str) -> None:
        ready()

    async def serve() -> None:
        settings = Settings(serve=ServeSettings(host="127.0.0.1"))
        tokenizer = ChatTokenizer.from_folder(folder)
        engine = PacedClient(folder, rate, await tokenizer.encode(SAID, add_special_tokens=False))
        with tempfile.TemporaryDirectory() as data:
            config = StoreConfig(f"sqlite:///{data}/registry.sqlite", f"{data}/blobs", Path(data) / "store")
            async with open_store(SHAPE, MODEL, config, (MODEL,)) as store:
                services = assemble(settings, MODEL, engine, store, tokenizer, "0" * 64)
                await engine.start()
                served = uvicorn_config(create_app(settings, services), settings.http)
                if plain:
                    served.http = "h11"
                server = Server(served, services, 1.0, announce)
                serving = asyncio.create_task(server.serve(sockets=[listener]))
                await asyncio.to_thread(stop)
                server.should_exit = True
                await serving
                await engine.stop()

    configure("text", "front")
    with open(os.devnull, "w") as nowhere:
        cast("logging.StreamHandler[TextIO]", logging.getLogger().handlers[0]).setStream(nowhere)  # with its form
        (asyncio.run if plain else run)(serve())


async def streamed(front: Measured, path: str, body: Json, streams: int, seconds: float) -> Json:
    """Processor time a token, while so many streams run. A token is an event of its own."""
    counts = [0] * streams
    request = request_bytes(path, body | {"model": MODEL, "stream": True, "max_tokens": 8000})

    async def read(index: int) -> None:
        async with connected(front) as (reader, writer):
            writer.write(request)
            while data := await reader.read(1 << 16):
                counts[index] += data.count(b"data: ")

    tasks = [asyncio.create_task(read(index)) for index in range(streams)]
    await asyncio.sleep(WARM_SECONDS)
    busy, before, started = front.busy, sum(counts), time.perf_counter()
    await asyncio.sleep(seconds)
    busy, tokens, passed = front.busy - busy, sum(counts) - before, time.perf_counter() - started
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {"tokens_per_second": tokens / passed, "cores": busy / passed, "token_us": busy / tokens * 1e6}


async def answered(front: Measured, path: str, body: Json, requests: int) -> Json:
    """Processor time of a request for one token, over one connection, one after the other."""
    request = request_bytes(path, body | {"model": MODEL, "max_tokens": 1})
    async with connected(front) as (reader, writer):

        async def ask() -> None:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            (length,) = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            await reader.readexactly(int(length.split(b":")[1]))

        for _ in range(1 + requests // 10):
            await ask()
        busy = front.busy
        for _ in range(requests):
            await ask()
        return {"request_us": (front.busy - busy) / requests * 1e6}


@asynccontextmanager
async def connected(front: Measured) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def request_bytes(path: str, body: Json) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return f"{head}\r\n\r\n".encode() + data


if __name__ == "__main__":
    main()
