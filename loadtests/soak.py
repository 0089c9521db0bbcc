"""Mixed traffic with faults, and what must hold all the while: `python -m loadtests.soak --model FOLDER --minutes 10`.

A server of its own is asked by clients that read to the end, leave in the middle, or read slowly, while its engine is
killed and paused and adapters come and go. Invariants, of which each one broken is named and makes the exit code 1:

- a stream that is read to its end has one ending: a finish reason, or an error event; an answer is JSON, or an error;
- what fails, fails with an error that says try again: 503, or 404 of an adapter that was deleted;
- the usage ledger has exactly the tokens that the patient tenant's clients saw;
- in the end nothing is running, waiting, leased or pinned down, in KV or adapter pages;
- file descriptors and memory of the front end do not grow.

The last line printed is one JSON document.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from loadtests.faults import Faults
from loadtests.process import KEY, ServerProcess
from loadtests.random_adapter import LinearSizes, write_adapter
from loadtests.upload import upload

Json = dict[str, Any]

NAMES = ("soak-a", "soak-b", "soak-c")
PATIENT, HASTY = "patient", "hasty"
RETRYABLE = {503}
DESCRIPTORS = 8
"""So many more than at the start are no leak: kept connections, a log that was opened."""
MEMORY = 64 * 2**20
IDLE_SECONDS = 60.0


@dataclass
class Seen:
    """What the clients have seen. `tokens` of the patient tenant's streams; `broken` are sentences."""

    endings: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    requests: int = 0
    broken: list[str] = field(default_factory=list)


class Client:
    """Asks one request after the other until `stop` is set."""

    def __init__(self, http: httpx.AsyncClient, model: str, tenant: str, seen: Seen, seed: int) -> None:
        self._http = http
        self._model = model
        self._patient = tenant == PATIENT
        self._seen = seen
        self._rng = random.Random(seed)

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self._seen.requests += 1
            try:
                await self._ask(self._body())
            except httpx.HTTPError as error:
                self._seen.endings[type(error).__name__] += 1
                self._seen.broken.append(f"a connection broke: {error!r}")

    def _body(self) -> Json:
        rng = self._rng
        names = rng.sample(NAMES, rng.choice((0, 1, 1, 2, 3)))
        body: Json = {"model": self._model, "max_tokens": rng.randint(1, 24), "stream": True, "ignore_eos": True}
        body["prompt"] = [rng.randint(100, 400) for _ in range(rng.choice((3, 12, 60, 200)))]
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        if names:
            body["lora"] = {"adapters": [{"name": name, "weight": rng.uniform(0.1, 1.0)} for name in names]}
        return body

    async def _ask(self, body: Json) -> None:
        leaves = None if self._patient or self._rng.random() < 0.5 else self._rng.randint(0, 12)
        slow = not self._patient and self._rng.random() < 0.2
        finishes = errors = tokens = 0
        done = False
        async with self._http.stream("POST", "/v1/completions", json=body) as answer:
            if not answer.is_success:
                await self._refused(answer)
                return
            events = 0
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    done = True
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                errors += "error" in chunk
                finishes += sum(bool(choice.get("finish_reason")) for choice in chunk.get("choices", ()))
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
                events += 1
                if leaves is not None and events > leaves:
                    self._seen.endings["left"] += 1
                    return
                if slow:
                    await asyncio.sleep(0.2)
        if self._patient:
            self._seen.tokens += tokens
        self._seen.endings["finished" if finishes else "error event"] += 1
        if finishes + errors != 1 or (finishes and not done):
            self._seen.broken.append(f"a stream had {finishes} finish reasons, {errors} errors, [DONE]: {done}")

    async def _refused(self, answer: httpx.Response) -> None:
        await answer.aread()
        self._seen.endings[f"http {answer.status_code}"] += 1
        if answer.status_code in RETRYABLE and "retry-after" in answer.headers:
            await asyncio.sleep(0.2)
        else:
            self._seen.broken.append(f"refused with {answer.status_code}: {answer.text[:200]}")


async def soak(server: ServerProcess, model: str, folders: Sequence[Path], asked: argparse.Namespace) -> Json:
    """Run it, and return the document; `broken` is empty if everything held."""
    seen, stop = Seen(), asyncio.Event()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, headers=_bearer(KEY)) as admin:
        clients = [httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) for _ in range(2)]
        for tenant, http in zip((PATIENT, HASTY), clients, strict=True):
            (await admin.post("/admin/v1/tenants", json={"id": tenant})).raise_for_status()
            made = (await admin.post(f"/admin/v1/tenants/{tenant}/keys", json={})).raise_for_status().json()
            http.headers.update(_bearer(made["key"]))
        faults = Faults(server.pid, admin, folders, asked.seed)
        before, memory = descriptors(server.pid), [server.resident_bytes()]
        tasks = [
            asyncio.create_task(Client(http, model, tenant, seen, asked.seed + place).run(stop))
            for tenant, http in zip((PATIENT, HASTY), clients, strict=True)
            for place in range(asked.clients)
        ]
        injecting = asyncio.create_task(faults.run(asked.fault_seconds))
        deadline = time.monotonic() + 60 * asked.minutes
        while time.monotonic() < deadline and not injecting.done():
            await asyncio.sleep(min(2.0, asked.minutes))
            memory.append(server.resident_bytes())
        injecting.cancel()
        with suppress(asyncio.CancelledError):
            await injecting
        stop.set()
        await asyncio.gather(*tasks)
        for http in clients:
            await http.aclose()
        broken = [*seen.broken, *await _afterwards(admin, faults, seen), *_grown(server, before, memory)]
    return {
        "minutes": asked.minutes,
        "seed": asked.seed,
        "requests": seen.requests,
        "endings": dict(seen.endings),
        "faults": dict(faults.counts),
        "refused": dict(faults.refused),
        "memory_mb": [round(size / 2**20) for size in (memory[0], max(memory), memory[-1])],
        "broken": broken,
    }


async def _afterwards(admin: httpx.AsyncClient, faults: Faults, seen: Seen) -> list[str]:
    """What does not hold once nobody asks any more."""
    if not await _until_idle(admin):
        return ["the server is not idle a minute after the last request"]
    await faults.clean()
    state = (await admin.get("/admin/v1/state")).json()
    (engine,) = state["engines"]
    broken = []
    held = {name: engine[name] for name in ("running", "waiting", "kv_used_blocks") if engine[name]}
    if held or engine["pages"].get("used"):
        broken.append(f"the idle engine holds {held}, pages {engine['pages']}")
    listed = (await admin.get("/admin/v1/adapters", params={"limit": 1000})).json()["data"]
    broken += [f"{row['name']} has {row['leases']} leases" for row in listed if row["leases"]]
    if [row["name"] for row in listed] != list(NAMES):
        broken.append(f"the adapters are {[row['name'] for row in listed]}, expected {NAMES}")
    usage = (await admin.get("/admin/v1/usage", params={"tenant": PATIENT, "limit": 1000})).json()["data"]
    counted = sum(row["generation_tokens"] for row in usage)
    if counted != seen.tokens:
        broken.append(f"the ledger has {counted} tokens, the clients saw {seen.tokens}")
    return broken


async def _until_idle(admin: httpx.AsyncClient) -> bool:
    deadline = time.monotonic() + IDLE_SECONDS
    while time.monotonic() < deadline:
        state = (await admin.get("/admin/v1/state")).json()
        busy = state["requests"] or state["running"] or state["waiting"] or not state["engines"][0]["alive"]
        if not busy:
            await asyncio.sleep(1.0)  # the engine's last report of its pages
            return True
        await asyncio.sleep(0.2)
    return False


def descriptors(pid: int) -> int:
    """Open file descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def _grown(server: ServerProcess, before: int, memory: Sequence[int]) -> list[str]:
    """Leaks. Memory is compared between the second and the last quarter: caches fill in the first."""
    broken = []
    if (now := descriptors(server.pid)) > before + DESCRIPTORS:
        broken.append(f"{now} file descriptors are open, {before} at the start")
    quarter = max(1, len(memory) // 4)
    if (grown := min(memory[-quarter:]) - max(memory[quarter : 2 * quarter] or memory)) > MEMORY:
        broken.append(f"the front end's memory grew by {grown / 2**20:.0f} MiB")
    return broken


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 0: everything held."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.soak", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=4, help="of each of two tenants [4]")
    parser.add_argument("--fault-seconds", type=float, default=2.0, help="between two faults, on average [2]")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    model = asked.model.resolve()
    with tempfile.TemporaryDirectory(prefix="loramux-soak-") as folder:
        work, sizes = Path(folder), LinearSizes.of(model)
        folders = [write_adapter(work / f"adapter-{seed}", sizes, 4, seed) for seed in range(4)]
        options = ["--max-model-len", "512", "--encoder", "none", "--kv-memory", "256MiB", "--page-memory", "64MiB"]
        with ServerProcess(model, work / "data", *options) as server:
            with server.client() as client:
                for name, own in zip(NAMES, folders, strict=False):
                    upload(client, name, own, public="true")
            document = asyncio.run(soak(server, model.name, folders, asked))
    print(json.dumps(document))
    for sentence in document["broken"][:20]:
        sys.stderr.write(f"broken: {sentence}\n")
    return 1 if document["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
