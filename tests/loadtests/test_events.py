"""Events as they come over a connection."""

from collections.abc import AsyncIterator
from itertools import pairwise

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.events import data_of


async def read(parts: list[bytes]) -> list[str]:
    async def content() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    return [data async for data in data_of(httpx.Response(200, content=content()))]


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n")), max_size=5),
    st.lists(st.integers(0, 200), max_size=6),
    st.sampled_from(["\n", "\r\n"]),
)
async def test_however_a_stream_is_cut_into_parts(texts: list[str], cuts: list[int], end: str) -> None:
    whole = "".join(f": a comment{end}data: {text}{end}{end}" for text in texts).encode()
    places = [0, *sorted(cuts), len(whole)]
    parts = [whole[a:b] for a, b in pairwise(places)]
    assert await read(parts) == texts


@pytest.mark.parametrize("text", ["a\x85b", "a\u2028b", "a\u2029b", "a\x0bb"])
async def test_characters_at_which_python_ends_lines(text: str) -> None:
    assert await read([f"data: {text}\n\n".encode()]) == [text]


async def test_what_the_end_cuts_is_no_event() -> None:
    assert await read([b"data: 1\n\ndata:2\n\ndata: 3"]) == ["1", "2"]
