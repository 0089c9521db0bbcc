"""`loramux chat` on a terminal, against the application behind a real socket."""

import asyncio
import os
import pty
import subprocess
import sys
import threading
from collections.abc import AsyncIterator

import pytest
from fake_engine import REPLY
from fakes import Harness


class Terminal:
    """The command on a terminal of its own, where Ctrl-C is a signal."""

    def __init__(self, url: str) -> None:
        leader, follower = pty.openpty()
        start = "import os, sys; os.login_tty(0); sys.argv = ['loramux', 'chat']; from server.cli import main; main()"
        environment = dict(os.environ) | {"LORAMUX_URL": url, "TERM": "xterm", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", start], stdin=follower, stdout=follower, stderr=follower, env=environment
        )
        os.close(follower)
        self._leader = leader
        self._seen = bytearray()
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    @property
    def seen(self) -> str:
        return self._seen.decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    async def until(self, text: str, count: int = 1) -> None:
        """Wait for the text to have come so many times."""
        for _ in range(6000):
            if self.seen.count(text) >= count:
                return
            await asyncio.sleep(0.01)
        pytest.fail(f"waited in vain for {text!r}: {self.seen!r}")

    async def close(self) -> int:
        code = await asyncio.to_thread(self.process.wait, 60)
        await asyncio.to_thread(self._reading.join)
        os.close(self._leader)
        return code

    def _read(self) -> None:
        try:
            while chunk := os.read(self._leader, 1 << 16):
                self._seen += chunk
        except OSError:  # the other side is closed
            return


@pytest.fixture
async def terminal(live: str) -> AsyncIterator[Terminal]:
    terminal = Terminal(live)
    yield terminal
    if terminal.process.poll() is None:
        terminal.process.kill()
        await terminal.close()


async def test_on_a_terminal(terminal: Terminal, harness: Harness) -> None:
    """Ctrl-C stops an answer, which stays in the conversation; an error ends nothing; the end of input does."""
    await terminal.until("tiny> ")
    harness.engine.hold_at = 4
    harness.engine.gate.clear()
    terminal.type("Hi\n")
    await terminal.until("Hello")
    while not harness.engine.num_waiting:
        await asyncio.sleep(0.01)
    terminal.type("\x03")
    await terminal.until("stopped")
    await terminal.until("tiny> ", 2)
    while not harness.engine.ended:
        await asyncio.sleep(0.01)
    assert list(harness.engine.ended.values()) == ["closed"]
    harness.engine.gate.set()

    terminal.type("/use nobody\n")
    await terminal.until("there is no adapter nobody")
    terminal.type("/use sql\n")
    await terminal.until("sql> ")
    terminal.type("given up\\\n")
    await terminal.until("... ")
    terminal.type("as well\x03")
    await terminal.until("sql> ", 2)
    terminal.type("Ho\n")
    await terminal.until(REPLY)
    await terminal.until("[sql 1.00; ")
    prompt = await harness.services.tokenizer.decode(harness.engine.requests[1].prompt)
    stopped = prompt.partition("<|im_start|>assistant\n")[2].partition("<|im_end|>")[0]
    assert stopped
    assert REPLY.startswith(stopped)
    assert prompt.endswith("user\nHo<|im_end|>\n<|im_start|>assistant\n")
    terminal.type("\x04")
    assert await terminal.close() == 0
