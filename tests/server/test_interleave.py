"""Streams read as one: every item comes, and the first error, whatever it is, ends all."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from server.interleave import interleave
from tests.panic import Panic


class Streams:
    """Several, and those that have been closed by now."""

    def __init__(self) -> None:
        self.closed: set[str] = set()

    async def of(self, name: str, count: int, error: BaseException | None = None) -> AsyncGenerator[str, None]:
        """So many items, each after the others have had a turn, then the error."""
        try:
            for number in range(count):
                await asyncio.sleep(0)
                yield f"{name}{number}"
            if error is not None:
                raise error
        finally:
            self.closed.add(name)


async def read(streams: list[AsyncGenerator[str, None]]) -> list[str]:
    async with asyncio.timeout(60.0), aclosing(interleave(streams)) as items:
        return [item async for item in items]


async def test_all_items_come_each_streams_in_order() -> None:
    streams = Streams()
    items = await read([streams.of("a", 3), streams.of("b", 0), streams.of("c", 2)])
    assert sorted(items) == ["a0", "a1", "a2", "c0", "c1"]
    assert [item for item in items if item[0] == "a"] == ["a0", "a1", "a2"]
    assert streams.closed == set("abc")


@pytest.mark.parametrize("error", [ValueError("bad"), Panic("at a token")])
@pytest.mark.parametrize("others", [0, 1, 2])
async def test_an_error_of_one_is_raised_and_ends_the_others(error: BaseException, others: int) -> None:
    """Also what is no Exception: nobody waits for a stream that has ended."""
    streams = Streams()
    with pytest.raises(type(error)) as raised:
        await read([streams.of("x", 1, error), *(streams.of(f"{number}", 100) for number in range(others))])
    assert raised.value is error
    assert "x" in streams.closed
    assert len(streams.closed) == 1 + others


async def test_whoever_stops_reading_closes_all() -> None:
    streams = Streams()
    async with asyncio.timeout(60.0), aclosing(interleave([streams.of("a", 9), streams.of("b", 9)])) as items:
        await anext(items)
    assert streams.closed == {"a", "b"}
