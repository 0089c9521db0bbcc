"""Questions that one front end has for all others, on their way through the parent."""

import asyncio
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from server.frontends.messages import Answers, Ask, Question

Send = Callable[[str, Question | Answers], None]
"""(name of a front end, message)"""
Complete = Callable[[str, str, Mapping[str, bytes]], list[bytes]]
"""(topic, name of the front end that asked, answers by name) to what it is told"""


@dataclass(eq=False)
class _Asked:
    """A question that is not answered by all yet. `missing`: the front ends, by the number that each got it under."""

    front: str
    ask: Ask
    missing: dict[int, str] = field(default_factory=dict)
    answers: dict[str, bytes] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None


class Exchange:
    """Hands questions on and answers back. Who dies owes no answer. For one event loop."""

    def __init__(self, send: Send, complete: Complete) -> None:
        self._send = send
        self._complete = complete
        self._numbers = itertools.count()
        self._open: dict[int, _Asked] = {}  # by the numbers of the questions that are not answered

    def __len__(self) -> int:
        """How many answers are awaited."""
        return len(self._open)

    def ask(self, front: str, ask: Ask, others: Iterable[str]) -> None:
        """A front end asks these."""
        asked = _Asked(front, ask)
        for other in others:
            number = next(self._numbers)
            asked.missing[number] = other
            self._open[number] = asked
            self._send(other, Question(number, ask.topic, ask.data))
        if ask.seconds is not None and asked.missing:
            asked.timer = asyncio.get_running_loop().call_later(ask.seconds, self._finish, asked)
        if not asked.missing:
            self._finish(asked)

    def answer(self, number: int, data: bytes) -> None:
        """Somebody answers. What comes too late is dropped."""
        asked = self._open.pop(number, None)
        if asked is not None:
            asked.answers[asked.missing.pop(number)] = data
            if not asked.missing:
                self._finish(asked)

    def topic(self, number: int) -> str | None:
        """What a question is about that is not answered."""
        asked = self._open.get(number)
        return None if asked is None else asked.ask.topic

    def gone(self, front: str) -> None:
        """A front end has died: nobody waits for its answers, nor does it for others', and what it said is no more."""
        for asked in self._open.values():
            asked.answers.pop(front, None)
        for number, asked in list(self._open.items()):
            if asked.front == front or asked.missing.get(number) == front:
                self._open.pop(number)
                asked.missing.pop(number)
                if not asked.missing:
                    self._finish(asked)

    def _finish(self, asked: _Asked) -> None:
        if asked.timer is not None:
            asked.timer.cancel()
        for number in asked.missing:
            del self._open[number]
        asked.missing.clear()
        answers = self._complete(asked.ask.topic, asked.front, asked.answers)
        self._send(asked.front, Answers(asked.ask.number, answers))
