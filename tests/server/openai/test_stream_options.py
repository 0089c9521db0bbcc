"""What a stream tells of its use, and fields that change nothing."""

import json

import httpx
import pytest
from fake_engine import REPLY
from fakes import Harness, events

USER = [{"role": "user", "content": "Hi"}]
URLS = {"/v1/chat/completions": {"messages": USER}, "/v1/completions": {"prompt": "Hi"}}


async def stream(client: httpx.AsyncClient, url: str, options: dict[str, bool] | None, **fields: object) -> list[dict]:
    body = {"model": "tiny", "stream": True, "stream_options": options, **URLS[url], **fields}
    response = await client.post(url, json=body)
    assert response.status_code == 200, response.text
    return events(response.text)


@pytest.mark.parametrize("url", URLS)
async def test_usage_in_every_event(client: httpx.AsyncClient, harness: Harness, url: str) -> None:
    found = await stream(client, url, {"include_usage": True, "continuous_usage_stats": True}, n=2)
    used = [event["usage"] for event in found]
    prompt = len(harness.engine.requests[0].prompt)
    assert {usage["prompt_tokens"] for usage in used} == {prompt}
    counts = [usage["completion_tokens"] for usage in used]
    assert counts == sorted(counts)
    assert counts[-1] == 2 * len(harness.engine.encode(REPLY))
    assert [usage["total_tokens"] - prompt for usage in used] == counts
    assert found[-1]["choices"] == []
    assert all(event["choices"] for event in found[:-1])


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("options", [None, {}, {"continuous_usage_stats": True}, {"include_usage": False}])
async def test_no_usage_unless_it_is_wanted(
    client: httpx.AsyncClient, url: str, options: dict[str, bool] | None
) -> None:
    assert not any("usage" in event for event in await stream(client, url, options))


@pytest.mark.parametrize("url", URLS)
async def test_usage_at_the_end(client: httpx.AsyncClient, url: str) -> None:
    *others, last = await stream(client, url, {"include_usage": True, "include_obfuscation": False})
    assert [event["usage"] for event in others] == [None] * len(others)
    assert last["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("url", URLS)
async def test_no_text_ends_the_line_of_its_event(client: httpx.AsyncClient, harness: Harness, url: str) -> None:
    text = "".join(f"a{chr(code)}b" for code in (*range(1, 0x20), 0x7F, 0x85, 0xE9, 0x2028, 0x2029, 0x1F600))
    harness.engine.say(text)
    body = {"model": "tiny", "stream": True, "max_tokens": 200, **URLS[url]}
    async with client.stream("POST", url, json=body) as response:
        lines = [line async for line in response.aiter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    assert "".join(choice.get("text") or choice.get("delta", {}).get("content", "") for choice in choices) == text


@pytest.mark.parametrize("url", URLS)
async def test_fields_of_openais_that_change_nothing(client: httpx.AsyncClient, harness: Harness, url: str) -> None:
    fields = {
        "user": "u",
        "store": True,
        "metadata": {"trace": "5"},
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "reasoning_effort": "low",
        "verbosity": "high",
        "best_of": 1,
        "suffix": None,
        "modalities": ["text"],
        "a_field_of_tomorrow": {"deep": [1]},
    }
    await stream(client, url, None, seed=1)
    await stream(client, url, None, seed=1, **fields)
    first, second = harness.engine.requests
    assert first.params == second.params
    assert first.prompt == second.prompt
    assert first.cache_key == second.cache_key
