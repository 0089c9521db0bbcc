"""The front ends of a running server, each of which can be asked."""

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from served import Served


def front_pids(served: Served) -> list[int]:
    """The front ends, oldest first."""
    children = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text().split()
    found = []
    for pid in children:
        with suppress(FileNotFoundError, ProcessLookupError):  # it may end while one looks
            if b"frontends.child" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return sorted(found)


class ToOne(httpx.AsyncBaseTransport):
    """To one of the front ends over one connection, whenever that was used last.

    A server closes what was idle for long, and the kernel gives the next connection to whichever front end it
    likes, so before every request it is asked where this one ends. A front end that has just been started listens only
    after a while, and all connections go to the others until then.
    """

    def __init__(self, served: Served, pid: int) -> None:
        self._served = served
        self._pid = pid
        self._connection = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        while await self._end(request.extensions) != self._pid:
            if self._pid not in front_pids(self._served):
                raise httpx.ConnectError(f"front end {self._pid} is gone", request=request)
            await self.aclose()
            self._connection = httpx.AsyncHTTPTransport()
        return await self._connection.handle_async_request(request)

    async def aclose(self) -> None:
        await self._connection.aclose()

    async def _end(self, extensions: Mapping[str, Any]) -> int | None:
        """Process id of the front end that the connection goes to, None if it is gone."""
        asked = f"{self._served.url}/version"
        request = httpx.Request("GET", asked, headers=self._served.headers, extensions=dict(extensions))
        try:
            reply = await self._connection.handle_async_request(request)
            await reply.aread()
            await reply.aclose()
        except httpx.TransportError:  # whoever had it has ended
            return None
        port = reply.extensions["network_stream"].get_extra_info("client_addr")[1]
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        ends = {f"socket:[{fields[9]}]" for fields in lines if fields[2].endswith(f":{port:04X}")}
        return next((pid for pid in front_pids(self._served) if _open_files(pid) & ends), None)


@asynccontextmanager
async def each_front(served: Served, count: int = 1) -> AsyncIterator[dict[int, list[httpx.AsyncClient]]]:
    """So many clients for every front end, each of which is connected. For one request at a time."""
    found: dict[int, list[httpx.AsyncClient]] = {pid: [] for pid in front_pids(served)}
    async with AsyncExitStack() as stack:
        for pid, clients in found.items():
            for _ in range(count):
                to = ToOne(served, pid)
                client = httpx.AsyncClient(transport=to, base_url=served.url, headers=served.headers, timeout=120)
                clients.append(await stack.enter_async_context(client))
                assert (await client.get("/version")).status_code == 200
        yield found


def _open_files(pid: int) -> set[str]:
    found = set()
    with suppress(FileNotFoundError, ProcessLookupError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                found.add(os.readlink(file))
    return found
