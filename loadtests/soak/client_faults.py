"""Clients that go away in each phase of a request, and one that stops reading."""

import asyncio
import json
import random
import socket
import struct
from functools import partial
from typing import Any

from loadtests.soak.faults import Fault
from loadtests.soak.seen import Seen

AT_ONCE = 4
UNREAD_SECONDS = 2.0
WHOLE_SECONDS = 900.0
"""Of 200 tokens beside others, on a machine that does much else; what is not over by then does not end."""

Reader = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class ClientFaults:
    """Over bare sockets to the server at `url`. `unread`: seconds for which `read_late` reads nothing."""

    def __init__(self, url: str, key: str, model: str, seen: Seen, seed: int, unread: float = UNREAD_SECONDS) -> None:
        self._host, _, port = url.removeprefix("http://").rpartition(":")
        self._port = int(port)
        self._key = key
        self._model = model
        self._seen = seen
        self._rng = random.Random(seed)
        self._unread = unread

    def kinds(self) -> dict[str, tuple[float, Fault]]:
        """Faults by name, with weights."""
        phases = ("connecting", "headers", "body", "waiting", "stream", "upload")
        kinds: dict[str, tuple[float, Fault]] = {
            f"client left ({phase})": (1.0, partial(self.leave, phase)) for phase in phases
        }
        return kinds | {"client read nothing": (1.0, self.read_late)}

    async def leave(self, phase: str) -> str:
        """Some at once, one half of them with a reset."""
        await asyncio.gather(*(self._leave(phase, reset=bool(number % 2)) for number in range(AT_ONCE)))
        return "left"

    async def read_late(self) -> str:
        """A stream of more than the buffers between hold, of which nothing is read for a while, and then all."""
        reader, writer = await self._connect(receive_buffer=4096)
        try:
            writer.write(self._request(max_tokens=200, logprobs=5, stream=True))
            await asyncio.sleep(self._unread)
            async with asyncio.timeout(WHOLE_SECONDS):
                answer = await reader.read()
        except (ConnectionError, TimeoutError) as error:
            self._seen.breaks(f"a stream that was read late does not end: {error!r}")
            return "cut"
        finally:
            writer.close()
        status = answer.partition(b"\r\n")[0]
        if b" 503 " in status:
            return "refused: 503"
        if b" 200 " not in status:
            self._seen.breaks(f"a client that reads late was answered {answer[:300]!r}")
            return "refused"
        # Any word may be among the likely tokens, `error` too.
        errors, is_done = answer.count(b'data: {"error"'), answer.count(b"data: [DONE]")
        if errors + is_done != 1:
            self._seen.breaks(f"a stream that was read late has {is_done} ends and {errors} errors")
        return "finished" if is_done else "error event"

    async def _leave(self, phase: str, *, reset: bool) -> None:
        reader, writer = await self._connect()
        whole = self._request(max_tokens=64, stream=True)
        head = whole.index(b"\r\n\r\n") + 4
        upload = self._head("/admin/v1/adapters", "multipart/form-data; boundary=b", 10**6) + b"--b\r\n" + b"x" * 4096
        parts = {"connecting": b"", "headers": whole[: head // 2], "body": whole[: head + 10], "upload": upload}
        try:
            writer.write(parts.get(phase, whole))
            await writer.drain()
            if phase == "stream":
                async with asyncio.timeout(WHOLE_SECONDS):
                    await reader.read(self._rng.randint(1, 2000))
            else:
                await asyncio.sleep(self._rng.uniform(0.0, 0.3))
        except (ConnectionError, TimeoutError) as error:
            self._seen.breaks(f"a client that was about to leave in phase {phase} saw {error!r}")
        finally:
            if reset:
                connection = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.close()

    async def _connect(self, receive_buffer: int | None = None) -> Reader:
        connection = socket.socket()
        connection.setblocking(False)
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            await asyncio.get_running_loop().sock_connect(connection, (self._host, self._port))
        except OSError:
            connection.close()
            raise
        return await asyncio.open_connection(sock=connection, limit=4096)

    def _request(self, **fields: Any) -> bytes:
        prompt = [self._rng.randint(100, 400) for _ in range(40)]
        body = json.dumps({"model": self._model, "prompt": prompt, "ignore_eos": True} | fields).encode()
        return self._head("/v1/completions", "application/json", len(body)) + body

    def _head(self, path: str, kind: str, length: int) -> bytes:
        lines = (f"POST {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {self._key}", "Connection: close")
        return "\r\n".join((*lines, f"Content-Type: {kind}", f"Content-Length: {length}", "", "")).encode()
