"""Requests that an engine died of: tried once more on their own, then not again."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.types import Mix
from server.engine.sequence import Request, SamplingParams
from server.engine.suspects import CRASHES, Quarantined, Suspects

POISON = Request("r1", (2, 3, 4), SamplingParams(max_tokens=4))
INNOCENT = Request("r2", (5, 6), SamplingParams(max_tokens=4))


async def admitted(suspects: Suspects, request: Request) -> bool:
    try:
        async with suspects.admitted(request):
            return True
    except Quarantined:
        return False


async def test_the_second_crash_convicts_whoever_was_there_both_times() -> None:
    suspects = Suspects()
    suspects.crashed([POISON, INNOCENT])
    assert await admitted(suspects, INNOCENT)
    suspects.cleared(INNOCENT)
    assert await admitted(suspects, POISON)
    suspects.crashed([POISON, replace(INNOCENT, id="r3")])
    assert not await admitted(suspects, POISON)
    assert await admitted(suspects, INNOCENT)  # it had been cleared: this is its first crash again


async def test_suspects_run_one_at_a_time_and_others_beside_them() -> None:
    suspects = Suspects()
    suspects.crashed([POISON, INNOCENT])
    async with AsyncExitStack() as running:
        await running.enter_async_context(suspects.admitted(POISON))
        second = asyncio.create_task(admitted(suspects, INNOCENT))
        assert await admitted(suspects, Request("other", (9,), SamplingParams()))
        await asyncio.sleep(0)
        assert not second.done()
    assert await second


async def test_a_suspect_that_leaves_while_it_waits_blocks_nobody() -> None:
    suspects = Suspects()
    suspects.crashed([POISON, INNOCENT])
    async with suspects.admitted(POISON):
        waiting = asyncio.create_task(admitted(suspects, INNOCENT))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert await admitted(suspects, INNOCENT)


async def test_one_that_waits_is_convicted_by_what_happens_meanwhile() -> None:
    suspects = Suspects()
    suspects.crashed([POISON])
    async with suspects.admitted(POISON):
        again = asyncio.create_task(admitted(suspects, replace(POISON, id="again")))
        await asyncio.sleep(0)
        suspects.crashed([POISON])
    assert not await again


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (replace(POISON, id="x", tenant="acme", params=SamplingParams(seed=9, temperature=1.0)), True),
        (replace(POISON, prompt=(2, 3)), False),
        (replace(POISON, cache_key=b"salt"), False),
        (replace(POISON, mix=Mix.of([("d" * 64, 1.0)]), paths={"d" * 64: "p"}), False),
    ],
)
async def test_a_retry_is_known_by_what_it_asks(other: Request, same: bool) -> None:
    suspects = Suspects()
    for _ in range(CRASHES):
        suspects.crashed([other])
    assert await admitted(suspects, POISON) != same


@given(st.lists(st.lists(st.integers(0, 30), max_size=8), max_size=12))
def test_memory_is_bounded(crashes: list[list[int]]) -> None:
    suspects = Suspects(kept=5)
    for tokens in crashes:
        suspects.crashed(replace(POISON, prompt=(token,)) for token in tokens)
        assert len(suspects._crashes) <= 5
