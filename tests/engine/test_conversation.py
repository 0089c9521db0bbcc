"""A front end's conversation with an engine whose every word is the test's."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
import zmq
import zmq.asyncio
from polling import until
from scripted import INFO

from server.engine.conversation import EngineConversation
from server.engine.messages import Submit, Update, decode_to_engine, encode
from server.engine.sequence import FinishReason, Output, Request, SamplingParams
from server.engine.suspects import Suspects

PARAMS = SamplingParams(max_tokens=4)
FIRST, SECOND = Request("first", (2, 3), PARAMS), Request("second", (4, 5), PARAMS)


class Told:
    """A conversation, and the other end of its socket."""

    def __init__(self, folder: Path) -> None:
        self.suspects = Suspects()
        self.talk = EngineConversation("front", self.suspects)
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._address = f"ipc://{folder / 'engine'}"
        self._socket.bind(self._address)

    def begin(self) -> None:
        self.talk.connect(self._address, INFO)

    async def asked(self) -> str:
        """The next request that the engine is sent. It begins to look at it."""
        while True:
            _, data = await self._socket.recv_multipart()
            message = decode_to_engine(data)
            if isinstance(message, Submit):
                await self.say(Update(taken=[message.request.id]))
                return message.request.id

    async def say(self, update: Update) -> None:
        await self._socket.send_multipart((b"front", encode(update)))

    async def answer(self, request: Request) -> None:
        """To its end, at once."""
        outputs = [Output(request.id, (5,)), Output(request.id, (6,), finish_reason=FinishReason.LENGTH)]
        await self.say(Update(outputs))

    async def end(self) -> None:
        await self.talk.stop()
        self._context.destroy(linger=0)


@pytest.fixture
async def told(tmp_path: Path) -> AsyncIterator[Told]:
    made = Told(tmp_path)
    made.begin()
    yield made
    await made.end()


async def collect(talk: EngineConversation, request: Request) -> list[Output]:
    return [output async for output in talk.submit(request)]


async def test_an_answer_that_nobody_reads_is_no_work_of_the_engine(told: Told) -> None:
    """Its reader is slow: the engine, which has nothing to do and so says nothing, is neither stuck nor dies of it."""
    told.talk.stall_seconds = 0.0
    answered: list[None] = []
    told.talk.on_answered = lambda: answered.append(None)
    async with aclosing(told.talk.submit(FIRST)) as outputs:
        first = asyncio.ensure_future(anext(outputs))
        await told.asked()
        await told.answer(FIRST)
        assert (await first).tokens == (5,)
        await until(lambda: told.talk.unheard_for > 0)
        assert not told.talk.stalled
        assert told.talk.in_flight() == ()
        assert len(answered) == 1
        assert (await anext(outputs)).finish_reason is FinishReason.LENGTH


async def test_a_suspect_that_is_answered_gives_its_turn_on_whoever_reads_it(told: Told) -> None:
    told.suspects.crashed([FIRST, SECOND])
    async with aclosing(told.talk.submit(FIRST)) as outputs:
        begun = asyncio.ensure_future(anext(outputs))
        assert await told.asked() == "first"
        second = asyncio.create_task(collect(told.talk, SECOND))
        await told.answer(FIRST)
        await begun  # and nothing more is read
        assert await asyncio.wait_for(told.asked(), 60) == "second"
        await told.answer(SECOND)
        assert (await second)[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("tokens", [(), (5,)])
async def test_a_suspect_whose_reader_has_enough_is_none_any_more(told: Told, tokens: tuple[int, ...]) -> None:
    """As after a stop string. Of one that leaves before the first token nothing is known."""
    told.suspects.crashed([FIRST])
    async with aclosing(told.talk.submit(FIRST)) as outputs:
        begun = asyncio.ensure_future(anext(outputs))
        await told.asked()
        await told.say(Update([Output("first", tokens)]))
        await begun
    assert told.suspects.is_suspect(FIRST) == (not tokens)


async def test_the_time_of_a_suspect_passes_while_it_waits_for_its_turn(told: Told) -> None:
    told.suspects.crashed([FIRST, SECOND])
    first = asyncio.create_task(collect(told.talk, FIRST))
    await told.asked()
    late = Request("second", SECOND.prompt, PARAMS, timeout=0.01)
    assert [output.finish_reason for output in await collect(told.talk, late)] == [FinishReason.TIMEOUT]
    await told.answer(FIRST)
    assert (await first)[-1].finish_reason is FinishReason.LENGTH


async def test_an_engine_that_was_only_silent_is_heard_again(told: Told) -> None:
    """Where whoever hears that it is stuck knows better, nothing of what it says is lost."""
    said: list[None] = []
    told.talk.on_stuck = lambda: said.append(None)
    told.talk.stall_seconds = 0.001
    running = asyncio.create_task(collect(told.talk, FIRST))
    await told.asked()
    await until(lambda: len(said) > 1)
    await told.answer(FIRST)
    assert [output.tokens for output in await asyncio.wait_for(running, 60)] == [(5,), (6,)]
