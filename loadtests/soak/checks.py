"""What must hold once nobody asks any more."""

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import Any

import httpx

from loadtests.soak.adapter_faults import PRIVATE
from loadtests.soak.answers import PROMPTS, Answers, greedy
from loadtests.soak.leaks import Sample, left
from loadtests.soak.seen import Seen
from loadtests.soak.told import Told

IDLE_SECONDS = 180.0
REST_SECONDS = 60.0
BILL_SECONDS = 60.0
"""What cannot be written at once is written a while later."""


async def until_idle(admin: httpx.AsyncClient, seen: Seen) -> None:
    """Wait for it; what is still held then was lost track of."""
    deadline = time.monotonic() + IDLE_SECONDS
    held = ["nothing was asked"]
    while held and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
        answer = await admin.get("/admin/v1/state")
        held = _held(answer.json()) if answer.is_success else [f"is no state: {answer.status_code} {answer.text[:200]}"]
    for each in held:
        seen.breaks(f"{IDLE_SECONDS:.0f} s after the last request there {each}")


def _held(state: Mapping[str, Any]) -> list[str]:
    held = [f"are {state[name]} {name}" for name in ("requests", "running", "waiting", "uploads") if state[name]]
    for engine in state["engines"]:
        if not engine["alive"]:
            held.append("is no engine")
        for name in ("running", "waiting", "kv_used_blocks"):
            if engine[name]:
                held.append(f"are {engine[name]} {name} in the engine")
        if engine["pages"].get("used"):
            held.append(f"are pages {engine['pages']}")
    return held


async def check_rest(pid: int, before: Sample, seen: Seen, seconds: float = REST_SECONDS) -> Sample:
    """The front end holds what it held before, `seconds` later at the latest: connections take a while to close."""
    deadline = time.monotonic() + seconds
    while found := left(before, after := Sample.of(pid)):
        if time.monotonic() > deadline:
            seen.broken += found
            break
        await asyncio.sleep(0.5)
    return after


async def check_leases(admin: httpx.AsyncClient, tenants: Iterable[str], told: Told, seen: Seen) -> None:
    """No tenant holds an adapter that it can see."""
    for tenant in tenants:
        for name in told.certain():
            answer = await admin.get(f"/admin/v1/adapters/{name}", params={"tenant": tenant})
            if answer.status_code == httpx.codes.NOT_FOUND and name.startswith(PRIVATE):
                continue
            leases = answer.json()["leases"] if answer.is_success else f"{answer.status_code} {answer.text[:200]}"
            if leases:
                seen.breaks(f"{tenant} has leases of {name}: {leases}")


async def check_bill(admin: httpx.AsyncClient, tenant: str, seen: Seen, seconds: float = BILL_SECONDS) -> None:
    """The ledger has what the tenant's clients saw, `seconds` later at the latest."""
    expected = {"generation_tokens": seen.tokens, "prompt_tokens": seen.prompt_tokens}
    deadline = time.monotonic() + seconds
    while (counted := await _counted(admin, tenant, expected)) != expected and time.monotonic() < deadline:
        await asyncio.sleep(1.0)
    if counted != expected:
        seen.breaks(f"the ledger of {tenant} has {counted}, the clients saw {expected}")


async def _counted(admin: httpx.AsyncClient, tenant: str, columns: Iterable[str]) -> dict[str, int]:
    """Sums of the ledger, page by page."""
    sums, query = dict.fromkeys(columns, 0), {"tenant": tenant, "limit": "1000"}
    while True:
        page = (await admin.get("/admin/v1/usage", params=query)).raise_for_status().json()
        for row in page["data"]:
            for column in sums:
                sums[column] += row[column]
        if page["next"] is None:
            return sums
        query["cursor"] = page["next"]


async def check_answers(client: httpx.AsyncClient, told: Told, base: str, answers: Answers, seen: Seen) -> None:
    """Whatever was told can be used, and says what it has to."""
    for name, key in {base: base, **told.certain()}.items():
        answer = await client.post("/v1/completions", json=greedy(name, PROMPTS[0]))
        text = answer.json()["choices"][0]["text"] if answer.is_success else answer.text
        if not answer.is_success or not answers.agrees(key, PROMPTS[0], text):
            seen.breaks(f"after a restart {name} says {answer.status_code} {text!r}")
