"""Work in the background: again and again, over failures, and never cut off."""

import asyncio

import pytest

from server.periodic import repeating
from tests.panic import Panic


@pytest.mark.parametrize("failure", [ValueError("as the test wants"), Panic("in a file")])
async def test_it_goes_on_after_a_failure(failure: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    runs, done = 0, asyncio.Event()

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs == 3:
            done.set()
        raise failure

    async with repeating(work, 0.001), asyncio.timeout(60):
        await done.wait()
    assert len(caplog.records) == runs
    ended = runs
    await asyncio.sleep(0.01)
    assert runs == ended


async def test_a_run_under_way_is_waited_for() -> None:
    began, may_end, has_ended = asyncio.Event(), asyncio.Event(), False

    async def work() -> None:
        nonlocal has_ended
        began.set()
        await may_end.wait()
        has_ended = True

    async with repeating(work, 0.0):
        await began.wait()
        asyncio.get_running_loop().call_later(0.01, may_end.set)
    assert has_ended


async def test_the_end_does_not_wait_for_the_next_run() -> None:
    async def work() -> None:
        raise AssertionError

    async with asyncio.timeout(60), repeating(work, 10_000.0):
        await asyncio.sleep(0)
