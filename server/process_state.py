"""What a process does at this moment, and all processes of its server together."""

from collections.abc import Callable, Iterable

import msgspec

from server.generation import Generator
from server.siblings import Siblings

STATE, DRAIN = "state", "drain"
ANSWER_SECONDS = 2.0


class ProcessState(msgspec.Struct):
    """Requests that are being answered, and the seconds since the oldest of them came; None without one."""

    requests: int
    oldest_waiting: float | None
    oldest_running: float | None
    uploads: int


class Processes:
    """This process and the others. `uploads` counts registrations that run here."""

    def __init__(self, siblings: Siblings, generator: Generator, uploads: Callable[[], int]) -> None:
        self._siblings = siblings
        self._generator = generator
        self._uploads = uploads
        siblings.on(STATE, self._tell)
        siblings.on(DRAIN, self._drain)

    async def state(self) -> ProcessState:
        """Of all of them; one that does not answer soon is left out."""
        others = await self._siblings.ask(STATE, seconds=ANSWER_SECONDS)
        states = [self._own(), *(msgspec.msgpack.decode(each, type=ProcessState) for each in others if each)]
        return ProcessState(
            sum(each.requests for each in states),
            _longest(each.oldest_waiting for each in states),
            _longest(each.oldest_running for each in states),
            sum(each.uploads for each in states),
        )

    async def drain(self) -> int:
        """None takes new requests any more. How many are still being answered."""
        self._generator.is_draining = True
        others = await self._siblings.ask(DRAIN, seconds=ANSWER_SECONDS)
        return len(self._generator.running) + sum(int(each) for each in others if each)

    def _own(self) -> ProcessState:
        now = self._generator.services.clock()
        waiting = [now - each.arrival for each in self._generator.running if not each.has_started]
        running = [now - each.arrival for each in self._generator.running if each.has_started]
        oldest = max(waiting, default=None), max(running, default=None)
        return ProcessState(len(self._generator.running), *oldest, self._uploads())

    async def _tell(self, _: bytes) -> bytes:
        return msgspec.msgpack.encode(self._own())

    async def _drain(self, _: bytes) -> bytes:
        self._generator.is_draining = True
        return str(len(self._generator.running)).encode()


def _longest(ages: Iterable[float | None]) -> float | None:
    return max((age for age in ages if age is not None), default=None)
