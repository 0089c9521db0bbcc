"""How soon a server answers again after its engine died: `python -m loadtests.recovery --model FOLDER --kills 10`.

Seconds from SIGKILL until a new request has its first token, first without other requests, then beside streams that
ask again as soon as they end. The last line printed is one JSON document.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import httpx

from loadtests.process import KEY, ServerProcess
from loadtests.soak.engine_faults import ENGINE, RECOVERY_SECONDS, children, short_request

STREAMS = 4
STEADY_SECONDS = 2.0
"""Between a recovery and the next kill."""


async def recovery(http: httpx.AsyncClient, server: ServerProcess, model: str) -> float:
    """Kill the engine and wait for another one's first token. Raises RuntimeError if none comes, httpx.HTTPError."""
    started = time.monotonic()
    for engine in children(server.pid, ENGINE):
        os.kill(engine, signal.SIGKILL)
    while (seconds := time.monotonic() - started) < RECOVERY_SECONDS:
        answer = await http.post("/v1/completions", json=short_request(model))
        if answer.is_success:
            return time.monotonic() - started
        await asyncio.sleep(0.01)
    raise RuntimeError(f"no engine is back after {seconds:.0f} s: {answer.status_code} {answer.text[:300]}")


async def stream(http: httpx.AsyncClient, model: str) -> None:
    """Ask again and again, until cancelled."""
    while True:
        answer = await http.post("/v1/completions", json=short_request(model) | {"max_tokens": 64, "ignore_eos": True})
        await asyncio.sleep(0.0 if answer.is_success else 0.1)


async def measure(server: ServerProcess, model: str, kills: int) -> dict[str, list[float]]:
    """Seconds, by how busy the server was."""
    found: dict[str, list[float]] = {}
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120) as http:
        for name, streams in (("idle", 0), (f"{STREAMS} streams", STREAMS)):
            tasks = [asyncio.create_task(stream(http, model)) for _ in range(streams)]
            found[name] = []
            for number in range(kills):
                await asyncio.sleep(STEADY_SECONDS)
                found[name].append(await recovery(http, server, model))
                _say(f"{name}, kill {number + 1} of {kills}: {found[name][-1]:.2f} s")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.recovery", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--kills", type=int, default=10)
    asked = parser.parse_args(arguments)
    model = asked.model.resolve()
    _say("a server starts")
    with (
        tempfile.TemporaryDirectory(prefix="loramux-recovery-") as folder,
        ServerProcess(
            model, Path(folder), "--encoder", "none", "--kv-memory", "512MiB", "--max-model-len", "2048"
        ) as server,
    ):
        _say(f"it took {server.seconds:.1f} s")
        found = asyncio.run(measure(server, model.name, asked.kills))
    print(f"| {model.name} | median s | worst s |\n|---|---|---|")
    for name, seconds in found.items():
        print(f"| {name} | {median(seconds):.2f} | {max(seconds):.2f} |")
    print(json.dumps({name: [round(each, 3) for each in seconds] for name, seconds in found.items()}))
    return 0


def _say(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
