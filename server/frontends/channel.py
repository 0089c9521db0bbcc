"""Messages over a socket pair, each with its length before it."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Generic, TypeVar

from server.engine.messages import encode

LENGTH_BYTES = 8

T = TypeVar("T")


class Channel(Generic[T]):
    """One end. What comes is decoded to T; it ends when the process at the other end does, however that came about."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, decode: Callable[[bytes], T]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decode = decode

    @classmethod
    async def over(cls, end: socket.socket, decode: Callable[[bytes], T]) -> "Channel[T]":
        reader, writer = await asyncio.open_unix_connection(sock=end)
        return cls(reader, writer, decode)

    def send(self, message: object) -> None:
        """Never waits. What is for a process that is gone is lost."""
        data = encode(message)
        if not self._writer.is_closing():
            self._writer.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)

    async def receive(self) -> T:
        """The next message. Raises EOFError when there is none any more."""
        try:
            length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "little")
            return self._decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise EOFError from error

    async def close(self) -> None:
        """What was sent is on its way."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
