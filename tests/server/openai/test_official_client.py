"""OpenAI's own client, over a real socket."""

import asyncio

import openai
import pytest
from fake_engine import REPLY
from fakes import Harness
from openai import AsyncOpenAI, OpenAI

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def official(live: str):
    async with AsyncOpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_chat(official: AsyncOpenAI) -> None:
    answer = await official.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == REPLY
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.content or ()) == answer.usage.completion_tokens


async def test_chat_stream(official: AsyncOpenAI) -> None:
    stream = await official.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"lora": {"adapters": [{"name": "sql", "weight": 0.7}, {"name": "german", "weight": 0.3}]}},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == REPLY
    assert chunks[-1].usage is not None
    assert chunks[-1].model_extra is not None
    assert [adapter["weight"] for adapter in chunks[-1].model_extra["lora"]["adapters"]] == [0.7, 0.3]


async def test_stream_helper(official: AsyncOpenAI) -> None:
    async with official.chat.completions.stream(model="sql", messages=MESSAGES) as stream:
        async for _ in stream:
            pass
        answer = await stream.get_final_completion()
    assert answer.choices[0].message.content == REPLY


async def test_completions(official: AsyncOpenAI) -> None:
    answer = await official.completions.create(model="pirate", prompt=["Hi", "Ho"], n=2, echo=True)
    assert [choice.text for choice in answer.choices] == [f"Hi{REPLY}"] * 2 + [f"Ho{REPLY}"] * 2
    stream = await official.completions.create(model="pirate", prompt="Hi", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == REPLY


async def test_models(official: AsyncOpenAI) -> None:
    assert [model.id async for model in official.models.list()] == ["tiny", "german", "pirate", "sql"]
    assert (await official.models.retrieve("sql")).id == "sql"


async def test_many_at_once(official: AsyncOpenAI) -> None:
    async def ask(model: str) -> str | None:
        stream = await official.chat.completions.create(model=model, messages=MESSAGES, stream=True)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return "".join(parts)

    answers = await asyncio.gather(*(ask(model) for model in ["tiny", "sql", "german", "pirate"] * 8))
    assert set(answers) == {REPLY}


async def test_errors_are_the_clients_own(official: AsyncOpenAI, harness: Harness) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await official.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        await official.chat.completions.create(model="nobody", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    harness.engine.alive = False
    with pytest.raises(openai.InternalServerError) as down:
        await official.chat.completions.create(model="tiny", messages=MESSAGES)
    assert down.value.response.headers["retry-after"].isdigit()
    assert down.value.status_code == 503


async def test_an_engine_that_dies_ends_the_stream_with_an_error(official: AsyncOpenAI, harness: Harness) -> None:
    stream = await official.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    await anext(stream)
    harness.engine.kill()
    with pytest.raises(openai.APIError) as died:
        async for _ in stream:
            pass
    assert died.value.code == "engine_error"
    assert "/secret" not in str(died.value)
    harness.engine.alive = True
    answer = await official.chat.completions.create(model="tiny", messages=MESSAGES)
    assert answer.choices[0].message.content == REPLY


async def test_the_synchronous_client(live: str) -> None:
    def ask() -> str:
        with OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(model="sql", messages=MESSAGES, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert await asyncio.to_thread(ask) == REPLY
