"""What must hold once nobody asks any more."""

import asyncio
import time
from collections.abc import Iterable, Mapping

import httpx

from loadtests.soak.answers import PROMPTS, Answers, greedy
from loadtests.soak.seen import Seen
from loadtests.soak.told import Told

IDLE_SECONDS = 180.0


async def until_idle(admin: httpx.AsyncClient, seen: Seen) -> None:
    """Wait for it; what is still held then was lost track of."""
    deadline = time.monotonic() + IDLE_SECONDS
    held = ["nothing was asked"]
    while held and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
        held = _held((await admin.get("/admin/v1/state")).raise_for_status().json())
    for each in held:
        seen.breaks(f"{IDLE_SECONDS:.0f} s after the last request there {each}")


def _held(state: Mapping[str, object]) -> list[str]:
    held = [f"are {state[name]} {name}" for name in ("requests", "running", "waiting", "uploads") if state[name]]
    engines = state["engines"]
    assert isinstance(engines, list)
    for engine in engines:
        if not engine["alive"]:
            held.append("is no engine")
        for name in ("running", "waiting", "kv_used_blocks"):
            if engine[name]:
                held.append(f"are {engine[name]} {name} in the engine")
        if engine["pages"].get("used"):
            held.append(f"are pages {engine['pages']}")
    return held


async def check_leases(admin: httpx.AsyncClient, tenants: Iterable[str], told: Told, seen: Seen) -> None:
    """No tenant holds an adapter that it can see."""
    for tenant in tenants:
        for name in told.certain():
            answer = await admin.get(f"/admin/v1/adapters/{name}", params={"tenant": tenant})
            if answer.is_success and answer.json()["leases"]:
                seen.breaks(f"{tenant} has {answer.json()['leases']} leases of {name}")


async def check_bill(admin: httpx.AsyncClient, tenant: str, seen: Seen) -> None:
    """The ledger has what the tenant's clients saw."""
    answer = await admin.get("/admin/v1/usage", params={"tenant": tenant, "limit": 1000})
    rows = answer.raise_for_status().json()["data"]
    for column, expected in (("generation_tokens", seen.tokens), ("prompt_tokens", seen.prompt_tokens)):
        counted = sum(row[column] for row in rows)
        if counted != expected:
            seen.breaks(f"the ledger has {counted} {column}, the clients saw {expected}")


async def check_answers(client: httpx.AsyncClient, told: Told, base: str, answers: Answers, seen: Seen) -> None:
    """Whatever was told can be used, and says what it has to."""
    for name, key in {base: base, **told.certain()}.items():
        answer = await client.post("/v1/completions", json=greedy(name, PROMPTS[0]))
        text = answer.json()["choices"][0]["text"] if answer.is_success else answer.text
        if not answer.is_success or not answers.agrees(key, PROMPTS[0], text):
            seen.breaks(f"after a restart {name} says {answer.status_code} {text!r}")
