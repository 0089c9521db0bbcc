"""`timeout`: the time that a client gives its request."""

import asyncio

import httpx
import pytest
from fake_engine import REPLY
from fakes import Harness, events

from server.engine.sequence import FinishReason, Output, Request

URL = "/v1/completions"
BODY = {"model": "sql", "prompt": "Hi", "timeout": 30.0}


class Late:
    """An engine in which the time of every request is over after some tokens."""

    def __init__(self, harness: Harness, after: int) -> None:
        self.timeouts: list[float | None] = []
        self._submit = harness.engine.submit
        self._after = after
        harness.engine.submit = self.submit  # type: ignore[method-assign]

    async def submit(self, request: Request):
        self.timeouts.append(request.timeout)
        count = 0
        async for output in self._submit(request):
            if count == self._after:
                yield Output(request.id, finish_reason=FinishReason.TIMEOUT)
                return
            count += 1
            yield output


async def test_the_engine_gets_what_is_left(client: httpx.AsyncClient, harness: Harness) -> None:
    assert (await client.post(URL, json=BODY)).status_code == 200
    assert (await client.post(URL, json={**BODY, "timeout": None})).status_code == 200
    first, second = (request.timeout for request in harness.engine.requests)
    assert first is not None
    assert 0 < first < 30
    assert second is None


@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_token_it_is_an_error(client: httpx.AsyncClient, harness: Harness, stream: bool) -> None:
    Late(harness, 0)
    answer = await client.post(URL, json={**BODY, "stream": stream})
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert answer.json()["error"]["param"] == "timeout"
    assert harness.endings() == {"timeout": 1.0}


@pytest.mark.parametrize("stream", [False, True])
async def test_later_the_answer_ends_where_it_is(client: httpx.AsyncClient, harness: Harness, stream: bool) -> None:
    Late(harness, 3)
    answer = await client.post(URL, json={**BODY, "stream": stream})
    assert answer.status_code == 200
    bodies = events(answer.text) if stream else [answer.json()]
    text = "".join(choice["text"] for body in bodies for choice in body["choices"])
    assert 0 < len(text) < len(REPLY)
    assert REPLY.startswith(text)
    assert bodies[-1]["choices"][0]["finish_reason"] == "length"
    assert harness.endings() == {"timeout": 1.0}


async def test_time_that_is_over_before_the_engine_is_asked(
    client: httpx.AsyncClient, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the prompt is tokenised, and while folders are fetched: nothing is left of the request."""

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    for owner, name in ((harness.services.tokenizer, "encode"), (harness.store, "_path")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, never)
            answer = await client.post(URL, json={**BODY, "timeout": 0.01})
        assert answer.status_code == 504, name
    assert not harness.engine.requests


async def test_a_choice_that_waited_for_the_first_one(client: httpx.AsyncClient, harness: Harness) -> None:
    """The time of the request is that of all its choices."""
    late = Late(harness, 2)
    answer = await client.post(URL, json={**BODY, "prompt": "Hi " * 20, "n": 2, "stream": True})
    assert {choice["finish_reason"] for body in events(answer.text) for choice in body["choices"]} == {None, "length"}
    first, second = late.timeouts
    assert first is not None
    assert second is not None
    assert second < first
