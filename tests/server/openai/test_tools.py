"""Tool calls, by OpenAI's own client over a real socket."""

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from byte_tokenizer import TEMPLATE, byte_level_tokenizer
from fake_engine import REPLY
from fakes import Harness
from openai import AsyncOpenAI, pydantic_function_tool
from openai.types.chat import ChatCompletionMessage
from pydantic import BaseModel

from adapters_store.store import AdapterStore
from server.config import LimitSettings, Settings
from server.engine.constraint import ConstraintKind
from server.openai.messages import ChatMessage, plain
from server.tools.form import HERMES

USER = {"role": "user", "content": "What is the weather in Rome?"}


class Weather(BaseModel):
    """Tells the weather."""

    city: str
    days: int = 1


TOOL = pydantic_function_tool(Weather, name="weather")
NOW = {"type": "function", "function": {"name": "now"}}
CALL = HERMES.write("weather", {"city": "Rome", "days": 2})
NOW_CALL = HERMES.write("now", {})


def with_room(harness: Harness) -> Harness:
    """The fake engine's usual context is shorter than the instructions are."""
    assert harness.engine.info is not None
    harness.engine.info = replace(harness.engine.info, max_model_len=4096)
    return harness


@pytest.fixture
async def harness(make_harness: Callable[..., Harness]) -> AsyncIterator[Harness]:
    harness = with_room(make_harness())
    yield harness
    harness.check_all_given_back()


@pytest.fixture
async def official(live: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as client:
        yield client


async def ask(official: AsyncOpenAI, **options: Any) -> ChatCompletionMessage:
    answer = await official.chat.completions.create(
        **{"model": "tiny", "messages": [USER], "tools": [TOOL, NOW], **options}
    )
    choice = answer.choices[0]
    assert choice.finish_reason == ("tool_calls" if choice.message.tool_calls else "stop")
    return choice.message


async def stream(official: AsyncOpenAI, **options: Any) -> tuple[str, list[dict[str, str]], list[str | None]]:
    """The content, the calls put together as clients do it, and all reasons of endings."""
    chunks = await official.chat.completions.create(
        **{"model": "tiny", "messages": [USER], "tools": [TOOL, NOW], "stream": True, **options}
    )
    content, calls, reasons = "", list[dict[str, str]](), []
    async for chunk in chunks:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasons.append(choice.finish_reason)
            for delta in choice.delta.tool_calls or ():
                assert delta.function is not None
                if delta.index == len(calls):
                    assert delta.type == "function"
                    calls.append({"id": delta.id or "", "name": delta.function.name or "", "arguments": ""})
                else:
                    assert (delta.id, delta.function.name, delta.index) == (None, None, len(calls) - 1)
                calls[delta.index]["arguments"] += delta.function.arguments or ""
    return content, calls, reasons


def said(message: ChatCompletionMessage) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


async def prompt_of(harness: Harness) -> str:
    return await harness.services.tokenizer.decode(harness.engine.requests[-1].prompt)


async def test_a_call(official: AsyncOpenAI, harness: Harness) -> None:
    harness.engine.say(f"I look.\n{CALL}")
    message = await ask(official)
    assert message.content == "I look."
    assert said(message) == [("weather", {"city": "Rome", "days": 2})]
    assert message.tool_calls is not None
    assert message.tool_calls[0].id.startswith("call_")
    assert len(message.tool_calls[0].id) <= 40
    assert harness.engine.requests[-1].params.constraint is None


async def test_calls_alone_have_no_content(official: AsyncOpenAI, harness: Harness) -> None:
    harness.engine.say(f"{CALL}\n{NOW_CALL}")
    message = await ask(official)
    assert message.content is None
    assert said(message) == [("weather", {"city": "Rome", "days": 2}), ("now", {})]
    assert message.tool_calls is not None
    assert len({call.id for call in message.tool_calls}) == 2


async def test_an_answer_without_a_call(official: AsyncOpenAI, harness: Harness) -> None:
    message = await ask(official)
    assert message.content == REPLY
    assert message.tool_calls is None
    assert (await stream(official))[0] == REPLY
    harness.engine.say(broken := "<tool_call>\n{'name': 'now'}\n</tool_call>")
    assert (await ask(official)).content == broken
    assert await stream(official) == (broken, [], (await stream(official))[2])


async def test_a_stream(official: AsyncOpenAI, harness: Harness) -> None:
    """One token a step: names and arguments come in many pieces, and as in the answer that is not streamed."""
    harness.engine.say(f"I look.\n{CALL}\n{NOW_CALL}\nDone.")
    content, calls, reasons = await stream(official)
    assert content == "I look.\n\n\nDone." == (await ask(official)).content
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [
        ("weather", {"city": "Rome", "days": 2}),
        ("now", {}),
    ]
    assert len({call["id"] for call in calls}) == 2
    assert reasons[-1] == "tool_calls"
    assert set(reasons[:-1]) == {None}


async def test_the_first_delta_of_a_call_is_its_id_and_name(live: str, harness: Harness) -> None:
    harness.engine.say(CALL)
    body = {"model": "tiny", "messages": [USER], "tools": [TOOL], "stream": True, "logprobs": True}
    async with httpx.AsyncClient(base_url=live, timeout=60) as client:
        lines = (await client.post("/v1/chat/completions", json=body)).text.split("\n\n")
    choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    deltas = [choice["delta"]["tool_calls"][0] for choice in choices if "tool_calls" in choice["delta"]]
    first, *others = deltas
    assert first["function"] == {"name": "weather", "arguments": ""}
    assert first.keys() == {"index", "id", "type", "function"}
    assert len(others) > 3
    assert all(delta.keys() == {"index", "function"} and delta["function"].keys() == {"arguments"} for delta in others)
    tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert "".join(token["token"] for token in tokens) == CALL


async def test_the_stream_helper(official: AsyncOpenAI, harness: Harness) -> None:
    harness.engine.say(CALL)
    async with official.chat.completions.stream(model="tiny", messages=[USER], tools=[TOOL]) as events:
        names = [event.name async for event in events if event.type == "tool_calls.function.arguments.done"]
        answer = await events.get_final_completion()
    assert names == ["weather"]
    assert answer.choices[0].message.tool_calls[0].function.parsed_arguments == Weather(city="Rome", days=2)


async def test_an_answer_that_is_cut(official: AsyncOpenAI, harness: Harness) -> None:
    harness.engine.say(CALL)
    count = len(harness.engine.encode(CALL[: CALL.index("Rome") + 4]))
    answer = await official.chat.completions.create(model="tiny", messages=[USER], tools=[TOOL], max_tokens=count)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.tool_calls is not None
    assert answer.choices[0].message.tool_calls[0].function.arguments == '{"city": "Rome'


async def test_one_call_at_a_time(official: AsyncOpenAI, harness: Harness) -> None:
    harness.engine.say(f"{CALL}\n{NOW_CALL}")
    assert said(await ask(official, parallel_tool_calls=False)) == [("weather", {"city": "Rome", "days": 2})]
    assert len((await stream(official, parallel_tool_calls=False))[1]) == 1


async def test_each_choice_has_calls_of_its_own(official: AsyncOpenAI, harness: Harness) -> None:
    harness.engine.answer(
        lambda request: harness.engine.encode(CALL if request.id.endswith("-0") else "Nothing to do.")
    )
    answer = await official.chat.completions.create(model="tiny", messages=[USER], tools=[TOOL], n=2)
    assert [choice.finish_reason for choice in answer.choices] == ["tool_calls", "stop"]
    assert answer.choices[1].message.content == "Nothing to do."


async def test_none_means_that_text_is_text(official: AsyncOpenAI, harness: Harness) -> None:
    harness.engine.say(CALL)
    message = await ask(official, tool_choice="none")
    assert (message.content, message.tool_calls) == (CALL, None)
    assert "weather." not in await prompt_of(harness)
    assert (await official.chat.completions.create(model="tiny", messages=[USER], tool_choice="none")).choices


async def test_only_tools_that_are_allowed(official: AsyncOpenAI, harness: Harness) -> None:
    harness.engine.say(f"{CALL}\n{NOW_CALL}")
    allowed = {"mode": "auto", "tools": [NOW]}
    message = await ask(official, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert said(message) == [("now", {})]
    assert message.content == CALL
    assert "Tells the weather." in await prompt_of(harness)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "now"}),
        ({"type": "function", "function": {"name": "now"}}, {"now"}),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NOW]}}, {"now"}),
    ],
)
async def test_a_forced_call(official: AsyncOpenAI, harness: Harness, choice: Any, names: set[str]) -> None:
    """The prompt ends with the beginning of a call, and the constraint takes calls of these functions only."""
    harness.engine.say('{"name": "now", "arguments": {}}')
    assert said(await ask(official, tool_choice=choice)) == [("now", {})]
    assert [call["name"] for call in (await stream(official, tool_choice=choice))[1]] == ["now"]
    assert (await prompt_of(harness)).endswith("<|im_start|>assistant\n<tool_call>\n")
    constraint = harness.engine.requests[-1].params.constraint
    assert constraint is not None
    assert constraint.kind is ConstraintKind.GRAMMAR
    assert {name for name in ("weather", "now") if f'{{"const": "{name}"}}' in constraint.source} == names


async def test_a_form_of_the_answer_leaves_room_for_calls(official: AsyncOpenAI, harness: Harness) -> None:
    for tools, has_call in (([TOOL], True), (None, False)):
        await official.chat.completions.create(
            model="tiny",
            messages=[USER],
            response_format={"type": "json_object"},
            max_tokens=40,
            **({"tools": tools} if tools else {}),
        )
        constraint = harness.engine.requests[-1].params.constraint
        assert constraint is not None
        assert (HERMES.opening in constraint.source) is has_call


async def test_who_names_a_function_gets_one_call(official: AsyncOpenAI, harness: Harness) -> None:
    """As OpenAI does it, and clients count on it that read their answer from the arguments."""
    await ask(official, tool_choice="required")
    assert "(next call)" in harness.engine.requests[-1].params.constraint.source
    harness.engine.say('{"name": "now", "arguments": {}}')
    await ask(official, tool_choice={"type": "function", "function": {"name": "now"}}, parallel_tool_calls=True)
    assert "(next call)" not in harness.engine.requests[-1].params.constraint.source


async def test_the_older_form_is_refused_and_says_what_to_use(live: str) -> None:
    async with httpx.AsyncClient(base_url=live, timeout=60) as client:
        instead_of = {"functions": "tools", "function_call": "tool_choice", "guided_json": "structured_outputs.json"}
        for field, instead in instead_of.items():
            body = {"model": "tiny", "messages": [USER], field: [{"name": "f"}]}
            error = (await client.post("/v1/chat/completions", json=body)).json()["error"]
            assert error["code"] == "unsupported_parameter"
            assert error["message"] == f"{field}: not supported by this server; use {instead}"


async def test_a_forced_call_that_is_cut(official: AsyncOpenAI, harness: Harness) -> None:
    """There is no text, neither of the call nor of what stands between two of them."""
    call = '{"name": "now", "arguments": {}}'
    for text, calls in (('{"name": "no', []), (f"{call}\n</tool_call>\n<tool_", [("now", {})])):
        harness.engine.say(text)
        count = len(harness.engine.encode(text))
        asked: dict[str, Any] = {"model": "tiny", "messages": [USER], "tools": [NOW], "max_tokens": count}
        answer = await official.chat.completions.create(**asked, tool_choice="required")
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].message.content is None
        assert said(answer.choices[0].message) == calls
        assert (await stream(official, **asked, tool_choice="required"))[0] == ""


async def test_a_conversation(official: AsyncOpenAI, harness: Harness) -> None:
    """What the client got is what it sends back, and the template shows it as the model had written it."""
    harness.engine.say(f"I look.\n{CALL}\n{NOW_CALL}")
    message = await ask(official)
    assert message.tool_calls is not None
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": content}
        for call, content in zip(message.tool_calls, ("sunny", [{"type": "text", "text": "noon"}]), strict=True)
    ]
    harness.engine.say("It is sunny.")
    answer = await ask(official, messages=[USER, message, *results])
    assert answer.content == "It is sunny."
    prompt = await prompt_of(harness)
    assert f"<|im_start|>assistant\nI look.\n{CALL}\n{NOW_CALL}<|im_end|>" in prompt
    assert (
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nnoon\n</tool_response>" in prompt
    )
    await ask(official, messages=[USER, {**message.model_dump(), "content": None}, *results])
    assert f"<|im_start|>assistant\n{CALL}\n{NOW_CALL}<|im_end|>" in await prompt_of(harness)


def test_results_get_the_name_of_their_function() -> None:
    """Some templates show it, and clients are not obliged to send it."""
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    sent: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "c1"},
        {"role": "tool", "content": "night", "tool_call_id": "c1", "name": "its own"},
        {"role": "tool", "content": "?", "tool_call_id": "c2"},
    ]
    shown = plain([ChatMessage.model_validate(message, context=LimitSettings()) for message in sent])
    assert [message["role"] for message in shown] == ["system", "assistant", "tool", "tool", "tool"]
    assert [message.get("name") for message in shown[2:]] == ["now", "its own", None]
    assert (shown[1]["content"], shown[1]["tool_calls"]) == ("", [call])


async def test_usage_counts_the_tools(official: AsyncOpenAI, live: str) -> None:
    async def count(**tools: Any) -> int:
        answer = await official.chat.completions.create(model="tiny", messages=[USER], **tools)
        assert answer.usage is not None
        async with httpx.AsyncClient(base_url=live, timeout=60) as client:
            told = (await client.post("/tokenize", json={"messages": [USER], **tools})).json()
        assert told["count"] == answer.usage.prompt_tokens
        return answer.usage.prompt_tokens

    assert await count(tools=[NOW]) > await count() + 20


@pytest.fixture
async def special(store: AdapterStore) -> AsyncIterator[Harness]:
    """A model whose markers of calls are special tokens, which have no text elsewhere."""
    tokenizer = byte_level_tokenizer(TEMPLATE, more_special=["<tool_call>", "</tool_call>"])
    harness = with_room(Harness(store, tokenizer, Settings()))
    assert len(harness.engine.encode("<tool_call>")) == 1
    yield harness
    harness.check_all_given_back()


async def test_markers_that_are_special_tokens(special: Harness) -> None:
    special.engine.say(f"I look. {CALL}<|im_start|>")
    async with special.client() as client:
        body = {"model": "tiny", "messages": [USER], "tools": [TOOL]}
        message = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]
        assert message["content"] == "I look."
        assert message["tool_calls"][0]["function"]["name"] == "weather"
        plain = (await client.post("/v1/chat/completions", json={**body, "tools": []})).json()["choices"][0]["message"]
    assert plain["content"] == f"I look. {CALL}".replace("<tool_call>", "").replace("</tool_call>", "")
