"""Adapters that come and go while a trace runs: registered, replaced and deleted through the admin API."""

import asyncio
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from loadtests.upload import PARTS


@dataclass
class Churn:
    """What was changed; `failed` says what the server refused, by status."""

    registered: int = 0
    replaced: int = 0
    deleted: int = 0
    failed: dict[str, int] = field(default_factory=dict)


async def churn(client: httpx.AsyncClient, folders: Sequence[Path], rate: float, seed: int = 0) -> Churn:
    """About `rate` changes a second until it is cancelled, then everything that it registered is deleted again.

    `client` has the admin key. Names are `churn-0` and so on, never one of the trace's.
    """
    rng, done = random.Random(seed), Churn()
    alive: list[str] = []
    numbers = iter(range(10**9))
    try:
        while True:
            await asyncio.sleep(rng.expovariate(rate))
            choice = rng.choice(("register", "replace", "delete")) if alive else "register"
            if choice == "delete":
                await _delete(client, alive.pop(rng.randrange(len(alive))), done)
            else:
                name = f"churn-{next(numbers)}" if choice == "register" else rng.choice(alive)
                if await _put(client, name, rng.choice(folders), choice == "replace", done) and choice == "register":
                    alive.append(name)
    except asyncio.CancelledError:
        for name in alive:
            await _delete(client, name, done)
        return done


async def _put(client: httpx.AsyncClient, name: str, folder: Path, replace: bool, done: Churn) -> bool:
    with ExitStack() as opened:
        files = {part: opened.enter_context((folder / file).open("rb")) for part, file in PARTS.items()}
        data = {"name": name, "replace": str(replace).lower()}
        answer = await client.post("/admin/v1/adapters", data=data, files=files)
    if not answer.is_success:
        _fail(done, answer)
        return False
    if replace:
        done.replaced += 1
    else:
        done.registered += 1
    return True


async def _delete(client: httpx.AsyncClient, name: str, done: Churn) -> None:
    answer = await client.delete(f"/admin/v1/adapters/{name}")
    if answer.is_success:
        done.deleted += 1
    else:
        _fail(done, answer)


def _fail(done: Churn, answer: httpx.Response) -> None:
    key = f"{answer.request.method} {answer.status_code}"
    done.failed[key] = done.failed.get(key, 0) + 1
