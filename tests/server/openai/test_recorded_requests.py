"""Requests as agents, editors and chat frontends send them, written down by hand: each must be answered.

They carry fields that mean something at OpenAI only, and those are ignored, as OpenAI ignores what it does not know.
"""

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fake_engine import REPLY
from fakes import Harness, events

from server.tools.form import HERMES

EDIT = [
    {"role": "system", "content": "Act as an expert software developer."},
    {"role": "user", "content": "I switched to a new code base."},
    {"role": "assistant", "content": "Ok."},
    {"role": "user", "content": [{"type": "text", "text": "Add a docstring."}]},
]
PERSON = {
    "type": "function",
    "function": {
        "name": "Person",
        "description": "Correctly extracted `Person` with all the required parameters with correct types",
        "parameters": {
            "type": "object",
            "properties": {"age": {"title": "Age", "type": "integer"}, "name": {"title": "Name", "type": "string"}},
            "required": ["age", "name"],
        },
    },
}
SESSION = [
    {"role": "user", "content": "Read the file."},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"path": "a"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "name": "read", "content": "one line"},
    {"role": "user", "content": "What does it say?"},
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
CHAT: dict[str, dict[str, Any]] = {
    "an editor's diff": {"messages": EDIT, "temperature": 0, "stream": True},
    "a chat frontend": {
        "messages": [{"role": "user", "content": "Hi"}],
        **STREAM,
        "chat_id": "0192",
        "session_id": "abc",
        "features": {"web_search": False},
    },
    "the newest official client": {
        "messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "emma"}],
        "metadata": {"team": "a"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "hash",
        "prompt_cache_key": "key",
        "verbosity": "low",
        "max_completion_tokens": 64,
        "parallel_tool_calls": True,
        "stream": True,
        "stream_options": {"include_usage": True, "include_obfuscation": False},
    },
    "everything null": {
        "messages": [{"role": "user", "content": "Hi"}],
        **dict.fromkeys(
            (
                *("frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "max_tokens", "n", "presence_penalty"),
                *("response_format", "seed", "stop", "stream", "stream_options", "temperature", "top_p", "tools"),
                *("tool_choice", "user", "functions", "function_call", "modalities", "audio", "lora", "adapter_id"),
            )
        ),
    },
    "an agent's defaults": {
        "messages": [{"role": "user", "content": "Hi"}],
        "n": 1,
        "top_p": 1,
        "stop": [],
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "tools": [],
        "response_format": {"type": "text"},
        "max_tokens": 64,
    },
    "an agent that has called": {"messages": SESSION, "tools": [PERSON], "tool_choice": "auto", "temperature": 0.0},
    "an object by its schema": {  # instructor's mode JSON_SCHEMA
        "messages": [{"role": "user", "content": "Emma is 30."}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "Person",
                "schema": {**PERSON["function"]["parameters"], "additionalProperties": False},
                "strict": True,
            },
        },
        "max_tokens": 100,
    },
    "the AI SDK, with a tool made by zod": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Weather in Rome?"}]},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": "aSk9", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "aSk9", "content": '{"degrees":21}'},
        ],
        "tools": [WEATHER],
        "tool_choice": "auto",
        **STREAM,
    },
    "LlamaIndex, with a strict tool": {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, EDIT[1]],
        "stream": False,
        "temperature": 0.1,
        "parallel_tool_calls": False,
        "tools": [{"type": "function", "function": WEATHER["function"] | {"strict": True}}],
        "tool_choice": "auto",
    },
    "an editor's assistant that predicts its edit": {
        "messages": EDIT,
        "max_tokens": 64,
        "stop": ["<|im_end|>", "/src/"],
        "prediction": {"type": "content", "content": "def f():"},
        "reasoning_effort": None,
        **STREAM,
    },
    "samplers of local servers": {
        "messages": [{"role": "user", "content": "Hi"}],
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "add_generation_prompt": True,
        "best_of": 1,
        "length_penalty": 1.0,
        "cache_prompt": True,
        "mirostat": 0,
        "keep_alive": "5m",
    },
}


@pytest.fixture
async def harness(make_harness: Callable[..., Harness]) -> AsyncIterator[Harness]:
    harness = make_harness()
    assert harness.engine.info is not None
    harness.engine.info = replace(harness.engine.info, max_model_len=4096)
    yield harness
    harness.check_all_given_back()


@pytest.mark.parametrize("name", CHAT)
async def test_chat(client: httpx.AsyncClient, name: str) -> None:
    body = {"model": "sql", **CHAT[name]}
    headers = {"Authorization": "Bearer sk-none", "x-stainless-lang": "python", "Accept": "*/*", "OpenAI-Beta": "x"}
    answer = await client.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        assert answer.json()["choices"][0]["message"]["content"] == REPLY
        return
    chunks = events(answer.text)
    assert "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"]) == REPLY
    if "stream_options" in body:
        assert chunks[-1]["usage"]["total_tokens"] > 0


async def test_a_call_that_is_forced_by_name(client: httpx.AsyncClient, harness: Harness) -> None:
    """As `instructor` asks for an object: one tool, chosen by name, which the engine's grammar will enforce."""
    harness.engine.say(HERMES.write("Person", {"age": 30, "name": "Emma"}))
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Emma is 30."}],
        "tools": [PERSON],
        "tool_choice": {"type": "function", "function": {"name": "Person"}},
    }
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "Person"
    assert json.loads(call["function"]["arguments"]) == {"age": 30, "name": "Emma"}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "def f(", "max_tokens": 16, "temperature": 0, "stop": ["\n\n"], "stream": True},
        {"prompt": ["a", "b"], "max_tokens": 1, "temperature": 0, "seed": 1234},
        {"prompt": "Hi", "suffix": "", "best_of": 1, "n": 1, "user": "emma", "logit_bias": None},
        {"prompt": [[5, 6], [7]], "max_tokens": 4},
    ],
    ids=str,
)
async def test_completions(client: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    answer = await client.post("/v1/completions", json={"model": "tiny", **fields})
    assert answer.status_code == 200, answer.text


async def test_what_frontends_ask_first(client: httpx.AsyncClient) -> None:
    for path in ("/v1/models", "/health", "/version"):
        assert (await client.get(path, headers={"Authorization": "Bearer x"})).status_code == 200
