"""Where the time of a burst goes: `python -m server.bench_burst --model FOLDER --encoder FOLDER`. Last line: JSON.

So many requests at the same moment, over real HTTP on loopback, to a server whose engine's process only gives tokens.
Half of the bursts name an adapter, half let the server choose: with the real encoder (`encoder`), and with one whose
pass takes a given time in which no processor works, as if it ran on a GPU of its own (`table`). No text comes twice.
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from routing.bench_encoder import texts as make_texts
from server.bench_burst_server import LOADERS, Setup, name_of, serve

Json = dict[str, Any]
Stamps = Mapping[str, float]
PHASES: Mapping[str, tuple[str, str]] = {
    "way in, checks": ("sent", "arrived"),
    "until its turn": ("arrived", "reading"),
    "template, tokens": ("reading", "read"),
    "query": ("read", "asked"),
    "to the encoder": ("asked", "begin"),
    "its pass": ("begin", "end"),
    "back": ("end", "embedded"),
    "search": ("embedded", "naming"),
    "names": ("naming", "named"),
    "lease": ("named", "leased"),
    "submission": ("leased", "submitted"),
    "in all": ("sent", "submitted"),
}
"""Parts of a request's way by the moments between which they lie; those of an automatic choice are absent if named."""


def main(arguments: Sequence[str] | None = None) -> Json:
    """Measure, print a table for each forward pass and the JSON document."""
    parser = argparse.ArgumentParser(prog="python -m server.bench_burst", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--model", type=Path, required=True, metavar="FOLDER", help="of which only the tokenizer is used"
    )
    parser.add_argument("--encoder", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--device", default="cpu", help="of the encoder [cpu]")
    parser.add_argument("--forward", choices=tuple(LOADERS), action="append", help="repeatable [both]")
    parser.add_argument("--pass-ms", type=float, default=4.0, help="of a pass of the table [4]")
    parser.add_argument("--requests", type=int, default=32, help="of a burst [32]")
    parser.add_argument("--bursts", type=int, default=20, help="of each kind [20]")
    parser.add_argument("--adapters", type=int, default=60)
    parser.add_argument("--words", type=int, default=20, help="of a prompt [20]")
    parser.add_argument("--pause", type=float, default=0.4, help="seconds between bursts [0.4]")
    asked = parser.parse_args(arguments)
    document: Json = {"bench": "burst", "requests": asked.requests, "bursts": asked.bursts, "pass_ms": asked.pass_ms}
    for forward in asked.forward or LOADERS:
        document[forward] = measure(asked, forward)
        print("\n".join(lines(forward, document[forward])), flush=True)
    print(json.dumps(document))
    return document


def measure(asked: argparse.Namespace, forward: str) -> Json:
    """The figures of one server: of bursts that name an adapter, and of those that do not."""
    given = make_texts(2 * asked.bursts * asked.requests + asked.adapters, asked.words, seed=0)
    descriptions, prompts = given[: asked.adapters], given[asked.adapters :]
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as folder:
        notes, stamps = Path(folder) / "passes", Path(folder) / "stamps"
        setup = Setup(
            asked.model, asked.encoder, asked.device, forward, asked.pass_ms, tuple(descriptions), notes, stamps
        )
        with BurstServer(setup) as server:
            bursts = asyncio.run(_play(server, prompts, asked))
        passes = [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]
        requests = {each["text"]: each for each in json.loads(stamps.read_text(encoding="utf-8"))}
    by_text = {text: number for number, each in enumerate(passes) for text in each["texts"]}
    for burst in bursts:
        for text, sent in burst["sent"].items():
            requests[text]["sent"] = sent
            if text in by_text:
                requests[text] |= {name: passes[by_text[text]][name] for name in ("begin", "end")}
        burst["passes"] = len({by_text[text] for text in burst["sent"] if text in by_text})
    return {
        kind: _figures([burst for burst in bursts if burst["kind"] == kind], requests) for kind in ("named", "auto")
    }


def _figures(bursts: Sequence[Json], requests: Mapping[str, Stamps]) -> Json:
    """Medians over the bursts but the first, which warms up, in milliseconds."""
    rows: list[dict[str, float]] = []
    for burst in bursts[1:]:
        stamps = [requests[text] for text in burst["sent"]]
        row = {"passes": float(burst["passes"]), "cpu_ms": 1e3 * burst["busy"] / len(stamps)}
        for phase, (begin, end) in PHASES.items():
            spent = [each[end] - each[begin] for each in stamps if begin in each and end in each]
            if spent:
                row[phase] = 1e3 * float(np.mean(spent))
        begun = min(each["sent"] for each in stamps)
        submitted = [each["submitted"] - begun for each in stamps]
        for name, moment in (("first", np.min), ("mean", np.mean), ("last", np.max)):
            row[f"{name}_submitted_ms"] = 1e3 * float(moment(submitted))
        rows.append(row)
    return {name: float(np.median([row[name] for row in rows])) for name in rows[0]}


def lines(forward: str, found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The table."""
    named, auto = found["named"], found["auto"]
    shown = [f"{forward:24}{'named':>10}{'auto':>10}   ms"]
    for name in auto:
        before = f"{named[name]:10.2f}" if name in named else f"{'':10}"
        shown.append(f"{name:24}{before}{auto[name]:10.2f}")
    return shown


class BurstServer:
    """The server in a process of its own, while the block lasts."""

    def __init__(self, setup: Setup) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._ready, self._stop = context.Event(), context.Event()
        self._process = context.Process(target=serve, args=(self._listener, setup, self._ready.set, self._stop.wait))

    def __enter__(self) -> "BurstServer":
        self._process.start()
        if not self._ready.wait(600):
            raise RuntimeError("the server does not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._process.join(60)
        self._listener.close()

    @property
    def busy(self) -> float:
        """Seconds that the processors gave to the front end's threads so far."""
        tasks = Path(f"/proc/{self._process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


async def _play(server: BurstServer, prompts: Sequence[str], asked: argparse.Namespace) -> list[Json]:
    """All bursts, the kinds in turns, over connections that stay. `sent`: when each text was."""
    connections = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(asked.requests)]
    bursts: list[Json] = []
    for number in range(2 * asked.bursts):
        kind = ("named", "auto")[number % 2]
        given = prompts[number * asked.requests : (number + 1) * asked.requests]
        models = [name_of(index % asked.adapters) if kind == "named" else "auto" for index in range(len(given))]
        bodies = [_request(model, text) for model, text in zip(models, given, strict=True)]
        busy, sent = server.busy, {}
        for (_, writer), text, body in zip(connections, given, bodies, strict=True):
            sent[text] = time.perf_counter()
            writer.write(body)
        await asyncio.gather(*(_answer(reader) for reader, _ in connections))
        bursts.append({"kind": kind, "sent": sent, "busy": server.busy - busy})
        await asyncio.sleep(asked.pause)
    for _, writer in connections:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    return bursts


async def _answer(reader: asyncio.StreamReader) -> None:
    """Read one answer. Raises RuntimeError if it is an error."""
    head = await reader.readuntil(b"\r\n\r\n")
    (length,) = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    body = await reader.readexactly(int(length.split(b":")[1]))
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"the server answered {body[:300]!r}")


def _request(model: str, text: str) -> bytes:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 1}
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


if __name__ == "__main__":
    main()
