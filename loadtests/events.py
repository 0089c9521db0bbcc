"""Server-sent events, as servers of OpenAI's API write them: one line of data each."""

from collections.abc import AsyncIterator

import httpx


async def data_of(answer: httpx.Response) -> AsyncIterator[str]:
    """The data of each event as it comes. One that the connection's end cuts is none. Raises httpx.HTTPError.

    A line ends with LF or CRLF; httpx's own `aiter_lines` also ends it at U+0085 or U+2028, which JSON text may hold.
    """
    rest = b""
    async for part in answer.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").removeprefix(b" ").removesuffix(b"\r").decode()
