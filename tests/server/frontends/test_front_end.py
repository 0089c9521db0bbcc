"""A front end's process, as its parent sees it, with tasks of the test for processes."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from polling import until

from server.engine.backoff import Backoff
from server.frontends.channel import Channel
from server.frontends.front_end import PINGS, FrontEnd, Shared
from server.frontends.messages import Begin, Drain, Ping, Pong, Serving, Stop, ToFront, decode_to_front


class Process:
    """One that serves, and leaves when it is told to or `die` is called."""

    def __init__(self, descriptor: int, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.told: list[ToFront] = []
        self.hangs = False
        self.dies = asyncio.Event()
        self._end = socket.socket(fileno=os.dup(descriptor))
        self._task = asyncio.create_task(self._run())

    async def wait(self) -> int:
        await self._task
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        self.dies.set()

    async def _run(self) -> None:
        channel = await Channel.over(self._end, decode_to_front)
        hearing = asyncio.create_task(self._hear(channel))
        dying = asyncio.create_task(self.dies.wait())
        await asyncio.wait({hearing, dying}, return_when=asyncio.FIRST_COMPLETED)
        for task in (hearing, dying):
            task.cancel()
        await asyncio.gather(hearing, dying, return_exceptions=True)
        await channel.close()
        self.returncode = 0

    async def _hear(self, channel: "Channel[ToFront]") -> None:
        while True:
            message = await channel.receive()
            self.told.append(message)
            if isinstance(message, Begin):
                channel.send(Serving("serves"))
            elif isinstance(message, Ping) and not self.hangs:
                channel.send(Pong())
            elif isinstance(message, Drain | Stop):
                return


class System:
    """Where processes come from."""

    def __init__(self) -> None:
        self.processes: list[Process] = []
        self.has_room = True
        self.refused = 0
        self.may_spawn = asyncio.Event()
        self.may_spawn.set()
        self.is_spawning = False

    async def spawn(self, *_command: str, pass_fds: tuple[int, ...]) -> Process:
        if not self.has_room:
            self.refused += 1
            raise BlockingIOError("no room for a process")
        self.is_spawning = True
        await self.may_spawn.wait()
        self.is_spawning = False
        self.processes.append(Process(pass_fds[0], len(self.processes)))
        return self.processes[-1]


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    made = System()
    monkeypatch.setattr(asyncio, "create_subprocess_exec", made.spawn)
    monkeypatch.setattr(Backoff, "after", lambda _self, *, proven: 0.0)  # noqa: ARG005
    return made


@pytest.fixture
async def front(system: System) -> AsyncIterator[FrontEnd]:
    def nothing(*_: Any) -> None: ...

    made = FrontEnd(0, Shared(b"{}", 1, 2), nothing, nothing, nothing, silence=0.1)
    await made.start()
    yield made
    system.has_room = True
    system.may_spawn.set()
    made.kill()
    await asyncio.wait_for(made.end(Stop()), 60)


async def test_one_that_dies_is_followed(front: FrontEnd, system: System) -> None:
    assert (front.name, front.line) == ("0.1", "serves")
    system.processes[0].kill()
    await until(lambda: front.line is not None and front.name == "0.2")
    begun = system.processes[1].told[0]
    assert isinstance(begun, Begin)
    assert not begun.is_first


def pings(process: Process) -> int:
    return sum(isinstance(message, Ping) for message in process.told)


async def test_one_that_hangs_is_killed_and_followed(front: FrontEnd, system: System) -> None:
    first = system.processes[0]
    await until(lambda: pings(first) > 3 * PINGS)
    assert front.name == "0.1", "it answers"
    first.hangs = True
    await until(lambda: front.line is not None and front.name == "0.2")
    assert first.returncode is not None
    await until(lambda: pings(system.processes[1]) > 3 * PINGS)
    assert front.name == "0.2"


async def test_one_that_cannot_be_spawned_is_tried_again(front: FrontEnd, system: System) -> None:
    system.has_room = False
    system.processes[0].kill()
    await until(lambda: system.refused > 2)
    assert not front.alive
    system.has_room = True
    await until(lambda: front.line is not None)
    assert front.alive


@pytest.mark.parametrize("last", [Drain(), Stop()], ids=["drain", "stop"])
async def test_one_that_is_being_spawned_when_all_end_is_told(
    front: FrontEnd, system: System, last: Drain | Stop
) -> None:
    system.may_spawn.clear()
    system.processes[0].kill()
    await until(lambda: system.is_spawning)
    ending = asyncio.create_task(front.end(last))
    await asyncio.sleep(0)
    system.may_spawn.set()
    await asyncio.wait_for(ending, 60)
    assert [type(message) for message in system.processes[1].told] == [Begin, type(last)]
    assert len(system.processes) == 2
