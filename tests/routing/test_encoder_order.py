"""In which order texts are embedded: client and loop of the encoder, joined without a process between them."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from fake_encoder import WIDTH, vector

from routing import encoder as client
from routing.encoder import EncoderProcess
from routing.encoder_messages import Embedded, Failed, ToEncoder, decode_from_encoder, encode
from routing.encoder_process import EncoderLoop, Models
from routing.encoder_waiting import PassLimits, Waiting


class Recorder:
    """Notes its passes."""

    max_tokens = 256
    width = WIDTH

    def __init__(self, identity: str) -> None:
        self.id = identity
        self.passes: list[list[str]] = []

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.passes.append(list(texts))
        return np.stack([vector(self.id, text) for text in texts])


class Joined:
    """Stands for child and socket at once: messages lie here until the loop is told to step."""

    def __init__(self, on_answer: Callable[[Embedded | Failed], None], limits: PassLimits) -> None:
        self.sent: deque[bytes] = deque()
        self.on_answer = on_answer
        self.model = Recorder("base")
        self.loop = EncoderLoop(Models(lambda _: self.model), Waiting(limits), self)  # type: ignore[arg-type]

    def revive(self) -> None:
        """It lives."""

    def send(self, message: ToEncoder | bytes) -> None:
        if isinstance(message, bytes):  # the loop's answer
            answer = decode_from_encoder(message)
            assert isinstance(answer, Embedded | Failed)
            self.on_answer(answer)
        else:
            self.sent.append(encode(message))

    def poll(self, _timeout: int | None) -> bool:
        return bool(self.sent)

    def recv(self) -> bytes:
        return self.sent.popleft()

    def finish(self) -> None:
        while self.sent or self.loop.waiting:
            self.loop.step()


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> tuple[EncoderProcess, Joined]:
    """An encoder whose passes hold at most four texts."""

    def child(_start: object, _threads: int, on_answer: Callable[..., None], *_: object) -> Joined:
        return Joined(on_answer, PassLimits(4, 1024, 256))

    monkeypatch.setattr(client, "EncoderChild", child)
    process = EncoderProcess(Path("nowhere"), identify=lambda *_: ("base", WIDTH))
    assert isinstance(process._child, Joined)
    return process, process._child


def ask(process: EncoderProcess, *texts: str, bulk: bool = False, tenant: str = "") -> asyncio.Task[np.ndarray]:
    return asyncio.create_task(process.encoder().embed(list(texts), bulk=bulk, tenant=tenant))


async def sent() -> None:
    """Everybody has asked, which takes a turn of the event loop, and what they asked for is sent in the next one."""
    for _ in range(2):
        await asyncio.sleep(0)


async def test_all_that_waits_shares_passes(joined: tuple[EncoderProcess, Joined]) -> None:
    process, child = joined
    callers = [ask(process, f"caller {n}") for n in range(9)]
    await sent()
    child.finish()
    assert child.model.passes == [[f"caller {n}" for n in some] for some in (range(4), range(4, 8), range(8, 9))]
    for n, row in enumerate(await asyncio.gather(*callers)):
        np.testing.assert_array_equal(row, vector("base", f"caller {n}")[None])


async def test_bulk_waits_for_queries_and_is_not_remembered(joined: tuple[EncoderProcess, Joined]) -> None:
    process, child = joined
    bulk = ask(process, *(f"bulk {n}" for n in range(10)), bulk=True)
    await sent()
    callers = [ask(process, "query"), ask(process, "bulk 9"), ask(process, "bulk 0", bulk=True)]
    await sent()
    child.finish()
    assert sorted(child.model.passes[0]) == ["bulk 9", "query"]
    assert child.model.passes[1:] == [[f"bulk {n}" for n in some] for some in (range(4), range(4, 8), range(8, 9))]
    found = await bulk
    rows = await asyncio.gather(*callers)
    np.testing.assert_array_equal(rows[1][0], found[9])
    np.testing.assert_array_equal(rows[2][0], found[0])
    assert len(process.cache) == 2  # the query, and the text that became one


async def test_tenants_take_turns(joined: tuple[EncoderProcess, Joined]) -> None:
    process, child = joined
    flood = [ask(process, f"flood {n}", tenant="flood") for n in range(40)]
    await sent()
    child.loop.step()
    other = ask(process, "one", tenant="other")
    await sent()
    child.loop.step()  # the flood's turn again
    child.loop.step()
    assert (await other).shape == (1, WIDTH)
    child.finish()
    await asyncio.gather(*flood)
    assert len(child.model.passes) == 11


async def test_a_query_overtakes_bulk_that_has_begun(joined: tuple[EncoderProcess, Joined]) -> None:
    process, child = joined
    bulk = ask(process, *(f"bulk {n}" for n in range(12)), bulk=True)
    await sent()
    child.loop.step()
    query = ask(process, "query")
    await sent()
    child.loop.step()
    assert (await query).shape == (1, WIDTH)
    assert not bulk.done()
    child.finish()
    assert (await bulk).shape == (12, WIDTH)
    assert child.model.passes[1] == ["query"]


async def test_who_leaves_before_a_text_is_sent_takes_nothing_from_the_others(
    joined: tuple[EncoderProcess, Joined],
) -> None:
    process, child = joined
    leaving, staying = ask(process, "shared", "left alone"), ask(process, "shared", "other")
    await asyncio.sleep(0)  # both have asked; nothing is sent before the next turn
    assert not child.sent
    leaving.cancel()
    await sent()
    child.finish()
    np.testing.assert_array_equal(await staying, np.stack([vector("base", text) for text in ("shared", "other")]))
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert sorted(text for taken in child.model.passes for text in taken) == ["other", "shared"]


async def test_what_nobody_waits_for_is_not_computed(joined: tuple[EncoderProcess, Joined]) -> None:
    process, child = joined
    left, stays = ask(process, "shared", "left"), ask(process, "shared")
    await sent()
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    child.finish()
    await stays
    assert child.model.passes == [["shared"]]
    again = ask(process, "left")
    await sent()
    child.finish()
    assert (await again).shape == (1, WIDTH)


async def test_an_answer_that_crosses_a_cancellation_is_ignored(joined: tuple[EncoderProcess, Joined]) -> None:
    process, child = joined
    left = ask(process, "text")
    await sent()
    message = child.sent.popleft()
    left.cancel()
    await sent()
    child.sent.appendleft(message)
    child.sent.remove(child.sent[-1])  # the Forget comes too late
    child.finish()
    assert child.model.passes == [["text"]]
    assert left.cancelled()


async def test_the_same_text_in_flight_is_sent_once(joined: tuple[EncoderProcess, Joined]) -> None:
    process, child = joined
    callers = [ask(process, "same", "same", f"own {n % 3}") for n in range(30)]
    await sent()
    child.finish()
    rows = await asyncio.gather(*callers)
    assert sorted(text for texts in child.model.passes for text in texts) == ["own 0", "own 1", "own 2", "same"]
    np.testing.assert_array_equal(rows[0][0], rows[29][1])
    await asyncio.gather(*(ask(process, "same") for _ in range(3)))
    assert not child.sent


async def test_a_width_that_the_files_did_not_say_is_refused(joined: tuple[EncoderProcess, Joined]) -> None:
    process, child = joined
    process._identify = lambda *_: ("base", WIDTH + 1)
    caller = ask(process, "text")
    await sent()
    child.finish()
    with pytest.raises(client.EncoderUnavailable, match="gives 8 numbers a text, expected 9"):
        await caller
