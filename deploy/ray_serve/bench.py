"""What Ray Serve's way costs beside the direct one: `python -m deploy.ray_serve.bench --model FOLDER`.

The same engine without a model (server/engine/bench_paced.py) behind uvicorn, and behind Serve's proxy, a front end and
an engine replica on a cluster of this machine. Counted is the processor time of the server's process, and of Serve's
three; the engine's process, Ray's own daemons and the client are not. The last line printed is JSON.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from deploy.ray_serve.__main__ import APPLICATION, free_port, start_ray
from server.bench_front import BODIES, MODEL, SAID, Front, Json, Measured, PacedClient, answered, connected, streamed
from server.chat import ChatTokenizer
from server.config import RoutingSettings, ServeSettings, Settings
from server.engine.client import EngineClient
from server.engine.config import EngineConfig

PATH = "/v1/completions"
ROLES = {
    "ProxyActor": "proxy",
    "ServeReplica:loramux:front-ends": "front end",
    "ServeReplica:loramux:engines": "engine",
}


def main(arguments: Sequence[str] | None = None) -> Json:
    """Measure, print a table and the JSON document."""
    parser = argparse.ArgumentParser(prog="python -m deploy.ray_serve.bench")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rate", type=float, default=400.0, help="tokens a second of all streams together")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--requests", type=int, default=200)
    asked = parser.parse_args(arguments)
    rows: list[Json] = []
    with Front(asked.model, asked.rate) as front:
        rows.append({"way": "direct", **measure(front, asked)})
    with OnRay(asked.model, asked.rate) as on_ray:
        rows.append({"way": "ray", **measure(on_ray, asked), "shares": on_ray.shares})
    _print(rows)
    document = {"bench": "ray_serve", "rate": asked.rate, "rows": rows}
    print(json.dumps(document))
    return document


def measure(front: Measured, asked: argparse.Namespace) -> Json:
    """Processor time, and how long one request for one token takes (milliseconds, median)."""
    figures = asyncio.run(answered(front, PATH, BODIES[PATH], asked.requests))
    figures["request_ms"] = asyncio.run(waited(front, asked.requests))
    for streams in asked.streams:
        cost = asyncio.run(streamed(front, PATH, BODIES[PATH], streams, asked.seconds))
        figures |= {f"{name}_{streams}": value for name, value in cost.items()}
    return figures


class OnRay:
    """The application on a cluster of this machine, while the block lasts."""

    def __init__(self, folder: Path, rate: float) -> None:
        self._folder = folder
        self._rate = rate
        self._ports = ExitStack()
        self.port = self._ports.enter_context(free_port(ServeSettings(port=0)))
        self._data = tempfile.TemporaryDirectory()
        self._pids: dict[int, str] = {}

    def __enter__(self) -> "OnRay":
        import ray
        from ray import serve

        from deploy.ray_serve.application import build
        from deploy.ray_serve.settings import RaySettings

        tokens = asyncio.run(ChatTokenizer.from_folder(self._folder).encode(SAID, add_special_tokens=False))
        model = ServeSettings(model=str(self._folder), served_name=MODEL)
        settings = Settings(data_dir=Path(self._data.name), serve=model, routing=RoutingSettings(encoder="none"))
        start_ray(ray, None)
        serve.start(http_options={"host": "127.0.0.1", "port": self.port})
        paced = PacedEngine(self._rate, tuple(tokens))
        spread = RaySettings(cpus_per_front_end=0.1, cpus_per_engine=0.1)
        serve.run(build(settings, spread, paced), name=APPLICATION, route_prefix="/")
        self._pids = {pid: role for pid in _processes() if (role := _role(pid)) is not None}
        return self

    def __exit__(self, *_: object) -> None:
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()
        self._ports.close()
        self._data.cleanup()

    @property
    def busy(self) -> float:
        """Seconds that the processors gave to Serve's three processes so far."""
        return sum(map(_busy, self._pids))

    @property
    def shares(self) -> dict[str, float]:
        """Of `busy`, by role."""
        return {role: _busy(pid) / self.busy for pid, role in self._pids.items()}


class PacedEngine:
    """Makes a replica's engine: one that has no model."""

    def __init__(self, rate: float, tokens: Sequence[int]) -> None:
        self._rate = rate
        self._tokens = tokens

    def __call__(self, config: EngineConfig, stall_seconds: float) -> EngineClient:
        del stall_seconds
        return PacedClient(Path(config.model), self._rate, self._tokens)


async def waited(front: Measured, requests: int) -> float:
    """Milliseconds until the answer of one token is there, the median of requests one after the other."""
    body = json.dumps(BODIES[PATH] | {"model": MODEL, "max_tokens": 1}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    times: list[float] = []
    async with connected(front) as (reader, writer):
        for _ in range(requests):
            started = time.perf_counter()
            writer.write(f"{head}\r\n\r\n".encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(answer.partition(b"content-length:")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
            times.append(time.perf_counter() - started)
    return median(times) * 1e3


def _busy(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def _processes() -> list[int]:
    """Of this session of Ray: descendants of this process."""
    found, waiting = [], [os.getpid()]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        for task in Path(f"/proc/{pid}/task").iterdir():
            waiting.extend(map(int, (task / "children").read_text().split()))
    return found


def _role(pid: int) -> str | None:
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return next((role for part, role in ROLES.items() if command.startswith(f"ray::{part}")), None)


def _print(rows: Sequence[dict[str, Any]]) -> None:
    names = [name for name in rows[0] if name != "way"]
    print("figure               |     direct |        ray | ratio")
    for name in names:
        direct, on_ray = (row[name] for row in rows)
        print(f"{name:20} | {direct:10.2f} | {on_ray:10.2f} | {on_ray / direct:5.2f}")
    print(f"of Ray's: {', '.join(f'{role} {share:.0%}' for role, share in rows[1]['shares'].items())}")


if __name__ == "__main__":
    main()
