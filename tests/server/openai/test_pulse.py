"""Streams that have nothing to say, and readers that do not read."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import openai
import pytest
from caller import Caller
from fake_engine import REPLY
from fakes import Harness
from openai import AsyncOpenAI
from polling import until
from transformers import PreTrainedTokenizerFast

from adapters_store.store import AdapterStore
from server.config import HttpSettings, Settings
from server.openai.pulse import KEEP_ALIVE, Pulse

BODY = {"model": "sql", "prompt": "Hi", "max_tokens": 20, "stream": True}


@pytest.fixture
async def harness(store: AdapterStore, tokenizer: PreTrainedTokenizerFast) -> AsyncIterator[Harness]:
    """A server whose streams are never silent for long."""
    harness = Harness(store, tokenizer, Settings(http=HttpSettings(keep_alive=0.005, reader_timeout=0.05)))
    yield harness
    harness.check_all_given_back()
    assert harness.services.quotas.running("default") == 0


async def test_a_silent_stream_says_that_it_lives(harness: Harness) -> None:
    harness.engine.gate.clear()
    harness.engine.hold_at = 2
    caller = Caller(harness, "/v1/completions", BODY)
    await until(lambda: caller.text.endswith(KEEP_ALIVE * 3))
    harness.engine.gate.set()
    await asyncio.wait_for(caller.task, 60)
    said = caller.text.replace(KEEP_ALIVE, b"")
    assert said.endswith(b"data: [DONE]\n\n")
    assert said.count(b"data: ") == len(harness.engine.encode(REPLY)) + 1
    assert KEEP_ALIVE not in caller.text[caller.text.index(b"[DONE]") :]


async def test_a_late_first_token_does_not_keep_the_answer_from_beginning(harness: Harness) -> None:
    harness.engine.gate.clear()
    caller = Caller(harness, "/v1/completions", BODY)
    await until(lambda: caller.text == KEEP_ALIVE * 2)
    assert caller.sent[0]["status"] == 200
    assert b"x-loramux-route" in dict(caller.sent[0]["headers"])
    harness.engine.kill()
    await asyncio.wait_for(caller.task, 60)
    assert b'"code":"engine_error"' in caller.text
    harness.engine.alive = True


async def test_a_client_that_leaves_before_a_late_first_token(harness: Harness) -> None:
    harness.engine.gate.clear()
    caller = Caller(harness, "/v1/completions", BODY)
    await until(lambda: KEEP_ALIVE in caller.text)
    caller.leave()
    await asyncio.wait_for(caller.task, 60)
    assert harness.endings() == {"abort": 1.0}


async def test_a_refusal_before_the_silence_has_its_own_status(harness: Harness) -> None:
    caller = Caller(harness, "/v1/completions", BODY | {"logit_bias": {"99999": 1}})
    await asyncio.wait_for(caller.task, 60)
    assert caller.sent[0]["status"] == 400


async def test_the_official_client_skips_comments(harness: Harness, live: str) -> None:
    harness.engine.gate.clear()
    async with AsyncOpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as client:
        asking = asyncio.create_task(client.completions.create(model="tiny", prompt="Hi", stream=True))
        stream = await asyncio.wait_for(asking, 60)  # it has begun without a token
        harness.engine.gate.set()
        assert "".join([chunk.choices[0].text async for chunk in stream]) == REPLY
        harness.engine.gate.clear()
        late = await client.completions.create(model="tiny", prompt="Hi", stream=True)
        harness.engine.kill()
        with pytest.raises(openai.APIError) as died:
            await anext(aiter(late))
        assert died.value.code == "engine_error"
        harness.engine.alive = True


@pytest.mark.parametrize("when", [0, 3])
async def test_who_does_not_read_is_not_waited_for(harness: Harness, when: int) -> None:
    harness.engine.gate.clear()
    harness.engine.hold_at = when
    caller = Caller(harness, "/v1/completions", BODY)
    await until(lambda: caller.num_events >= when and caller.sent)
    caller.reads.clear()
    harness.engine.gate.set()
    await asyncio.wait_for(caller.task, 60)
    assert b"[DONE]" not in caller.text
    harness.check_all_given_back()


async def test_who_never_reads_is_not_waited_for_either(harness: Harness) -> None:
    """Not even the answer's head is taken, and the first token has not come."""
    harness.engine.gate.clear()
    caller = Caller(harness, "/v1/completions", BODY)
    caller.reads.clear()
    await asyncio.wait_for(caller.task, 60)
    assert not caller.sent
    assert harness.endings() == {"abort": 1.0}
    harness.check_all_given_back()


async def test_without_comments_readers_are_watched_all_the_same() -> None:
    sent: list[bytes] = []
    reads = asyncio.Event()

    async def send(message: dict[str, bytes]) -> None:
        await reads.wait()
        sent.append(message["body"])

    pulse = Pulse(send, 0, 0.01)  # type: ignore[arg-type]
    beating, sending = asyncio.create_task(pulse.beat()), asyncio.create_task(pulse.send(b"part"))
    await asyncio.wait_for(beating, 60)
    assert not sending.done()
    reads.set()
    await sending
    await pulse.end(b"end")
    assert sent == [b"part", b"end"]


async def test_by_default_a_quick_stream_has_no_comments(make_harness) -> None:
    async with make_harness().client(headers={"Accept-Encoding": "gzip, br"}) as client:
        answer = await client.post("/v1/completions", json=BODY)
        assert KEEP_ALIVE.decode() not in answer.text
        assert "content-encoding" not in answer.headers
        assert answer.headers["cache-control"] == "no-cache"


async def test_streams_of_many_at_once(harness: Harness, live: str) -> None:
    harness.engine.hold_at = 3
    async with httpx.AsyncClient(base_url=live, timeout=60) as client:
        answers = await asyncio.gather(*(client.post("/v1/completions", json=BODY) for _ in range(16)))
    assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers)
