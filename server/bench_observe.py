"""What watching costs: `python -m server.bench_observe --model FOLDER`. The last line printed is JSON.

The application without sockets and without a model: an engine that has every token at once, and requests that are given
to the application itself. So what is left is the front end's own work, and small differences show. Processor time of
the process: of the event loop's thread what the fastest tenth of the requests takes, since other work on a machine
only makes it more; of the threads that send spans, to a receiver in another process, the mean. All forms take turns.
FOLDER has the tokenizer.
"""

import argparse
import asyncio
import json
import logging
import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import quantiles
from typing import Any, cast

from starlette.types import ASGIApp, Message, Scope

from adapters_store.store import StoreConfig
from routing.router import Route
from server.app import create_app
from server.assembly import assemble
from server.bench_front import MODEL, SAID, SHAPE
from server.chat import ChatTokenizer
from server.config import ServeSettings, Settings
from server.deps import ServingEngine
from server.engine.bench_paced import INFO
from server.engine.config import EngineStats
from server.engine.sequence import FinishReason, Output, Request, Timings
from server.journal import Ending
from server.logs import formatter
from server.metrics import Metrics
from server.observer import Observer, Tracer
from server.opening import open_store
from server.serve import run
from server.tracing import open_tracer

Json = dict[str, Any]
LONG = 256
"""Tokens of the longer of the two streams whose difference is what tokens cost."""
BODY: Json = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "stream": True,
}


@dataclass(frozen=True)
class Form:
    """What is switched on. `traced` is the share of requests, None without a tracer."""

    name: str
    counts: bool = False
    logs: bool = False
    traced: float | None = None


FORMS = (
    Form("nothing"),
    Form("metrics", counts=True),
    Form("metrics, log", counts=True, logs=True),
    Form("metrics, log, 1 % traced", counts=True, logs=True, traced=0.01),
    Form("metrics, log, all traced", counts=True, logs=True, traced=1.0),
)


def main(arguments: Sequence[str] | None = None) -> Json:
    """Measure, print a table and the JSON document."""
    parser = argparse.ArgumentParser(prog="python -m server.bench_observe")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--requests", type=int, default=25, help="of each form in a round")
    asked = parser.parse_args(arguments)
    rows: list[Json] = []
    run(_measure(asked.model, asked.rounds, asked.requests, rows))
    print("watched by                | us a request | more | us a token | more")
    for row in rows:
        print(
            f"{row['form']:25} | {row['request_us']:12.0f} | {row['request_us'] - rows[0]['request_us']:4.0f}"
            f" | {row['token_us']:10.2f} | {row['token_us'] - rows[0]['token_us']:4.2f}"
        )
    document = {"bench": "observe", "rounds": asked.rounds, "requests": asked.requests, "rows": rows}
    print(json.dumps(document))
    return document


class Unwatched(Metrics):
    """Counts nothing."""

    def begin(self, route: Route) -> None: ...

    def gap(self, tenant: str, route: Route, seconds: float) -> None: ...

    def end(self, ending: Ending) -> None: ...

    def routed(self, route: Route, tenant: str) -> None: ...

    def answered(self, method: str, endpoint: str | None, status: int) -> None: ...


class InstantEngine:
    """Has all tokens of a request at once, and is asked for nothing else."""

    info = INFO
    alive = True
    stats = EngineStats()

    def __init__(self, said: Sequence[int]) -> None:
        self._said = said

    def evict(self, digest: str) -> None: ...

    async def submit(self, request: Request) -> AsyncGenerator[Output, None]:
        count = request.params.max_tokens
        for number in range(count):
            yield Output(
                request.id,
                tokens=(self._said[number % len(self._said)],),
                finish_reason=FinishReason.LENGTH if number == count - 1 else None,
                timings=Timings(0.001, 0.002) if number == 0 else None,
            )


async def _measure(folder: Path, rounds: int, requests: int, rows: list[Json]) -> None:
    tokenizer = ChatTokenizer.from_folder(folder)
    said = await tokenizer.encode(SAID, add_special_tokens=False)
    with tempfile.TemporaryDirectory() as data, ExitStack() as stack:
        receiver = stack.enter_context(Receiver())
        log = logging.StreamHandler(stack.enter_context(open(os.devnull, "w")))
        log.setFormatter(formatter("json", "front"))
        config = StoreConfig(f"sqlite:///{data}/registry.sqlite", f"{data}/blobs", Path(data) / "store")
        async with open_store(SHAPE, MODEL, config, (MODEL,)) as store:
            settings = Settings(serve=ServeSettings(host="127.0.0.1"))
            apps: list[ASGIApp] = []
            tracers: list[Tracer] = []
            for form in FORMS:
                tracer = receiver.tracer(form.traced)
                tracers += [tracer] if tracer is not None else []
                engine = cast(ServingEngine, InstantEngine(said))
                services = assemble(settings, MODEL, engine, store, tokenizer, "0" * 64, tracer=tracer)
                if not form.counts:
                    metrics = Unwatched()
                    services.generator.services = replace(services.generator.services, metrics=metrics)
                    services = replace(services, observer=Observer(metrics, time.perf_counter))
                apps.append(_with_state(create_app(settings, services), services))
            costs = [Costs() for _ in FORMS]
            for _ in range(rounds):
                for form, app, cost in zip(FORMS, apps, costs, strict=True):
                    with _lines_to(log if form.logs else None):
                        await cost.ask(app, 1, requests)
                        await cost.ask(app, LONG, max(1, requests // 5))
            for form, cost in zip(FORMS, costs, strict=True):
                short, long = cost.seconds(1), cost.seconds(LONG)
                token = (long - short) / (LONG - 1)
                request = short - token + cost.beside  # the token that every request has
                rows.append({"form": form.name, "request_us": request * 1e6, "token_us": token * 1e6})
            for tracer in tracers:
                await asyncio.to_thread(tracer.close)


class Costs:
    """What requests took of the event loop's thread, one by one, and other threads all together, in seconds."""

    def __init__(self) -> None:
        self._taken: defaultdict[int, list[float]] = defaultdict(list)
        self._others = 0.0

    async def ask(self, app: ASGIApp, tokens: int, requests: int) -> None:
        """So many streams of so many tokens, one after the other."""
        body = json.dumps(BODY | {"max_tokens": tokens}).encode()
        process, thread = time.process_time(), time.thread_time()
        for _ in range(requests):
            started = time.thread_time()
            await _ask(app, body)
            self._taken[tokens].append(time.thread_time() - started)
        self._others += (time.process_time() - process) - (time.thread_time() - thread)

    def seconds(self, tokens: int) -> float:
        """Of one such request, where nothing else disturbed the caches: the fastest tenth is below."""
        return quantiles(self._taken[tokens], n=10)[0]

    @property
    def beside(self) -> float:
        """What other threads took for a request, on average."""
        return self._others / sum(map(len, self._taken.values()))


async def _ask(app: ASGIApp, body: bytes) -> None:
    gone = asyncio.Event()
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] != 200:
            raise RuntimeError(f"an answer has the status {message['status']}")

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    path = "/v1/chat/completions"
    scope: Json = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    await app(scope | {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "scheme": "http"}, receive, send)


def _with_state(app: ASGIApp, services: Any) -> ASGIApp:
    async def with_state(scope: Scope, receive: Any, send: Any) -> None:
        await app({**scope, "state": {"services": services}}, receive, send)

    return with_state


@contextmanager
def _lines_to(handler: logging.Handler | None) -> Iterator[None]:
    """While the block lasts, lines of the log go to this handler, or are not made."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    if handler is not None:
        root.handlers[:] = [handler]
        root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.handlers[:] = before
        root.setLevel(level)


class Receiver:
    """A process that takes spans and forgets them."""

    def __enter__(self) -> "Receiver":
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_receive, args=(theirs,), daemon=True)
        self._process.start()
        self._port = ours.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()

    def tracer(self, share: float | None) -> Tracer | None:
        """One that sends so many of all traces here."""
        if share is None:
            return None
        os.environ["OTEL_TRACES_SAMPLER"] = "parentbased_traceidratio"
        os.environ["OTEL_TRACES_SAMPLER_ARG"] = str(share)
        return open_tracer(f"http://127.0.0.1:{self._port}/v1/traces", "0")


def _receive(pipe: Any) -> None:
    class Taker(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Taker)
    pipe.send(server.server_port)
    server.serve_forever()


if __name__ == "__main__":
    main()
