"""Log-probabilities of answers: the tokens of exactly the text that is given out, streamed or not."""

from typing import Any

import httpx
import pytest
from fakes import Harness, events

TEXT = "Größe: 漢字 and 😀😀 end.\n\nMore STOP text"
CASES = {
    "whole": (TEXT, []),
    "cut between tokens": (TEXT, ["\n\n"]),
    "cut within a token": (TEXT, ["nd"]),
    "cut within a character's tokens": (TEXT, ["字"]),
    "cut over several tokens": (TEXT, ["😀 end.\n\nMore"]),
    "a stop that almost comes": (TEXT, ["STOP texture"]),
    "nothing left": (TEXT, ["G"]),
    "special tokens between": ("a<|im_end|>b<|im_start|>c STOP d", [" STOP"]),
}


async def lists(client: httpx.AsyncClient, *, stream: bool, **fields: Any) -> tuple[str, list[tuple[Any, ...]]]:
    """The text of a completion, and by token its name, log-probability, alternatives and offset."""
    response = await client.post(
        "/v1/completions", json={"model": "tiny", "prompt": "Hi", "logprobs": 2, "stream": stream, **fields}
    )
    bodies = events(response.text) if stream else [response.json()]
    text, tokens = "", []
    for body in bodies:
        (choice,) = body["choices"]
        text += choice["text"]
        own = choice["logprobs"]
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        tokens += list(zip(*(own[name] for name in names), strict=True))
    return text, tokens


@pytest.mark.parametrize("case", CASES)
async def test_tokens_are_those_of_the_text(client: httpx.AsyncClient, harness: Harness, case: str) -> None:
    said, stop = CASES[case]
    harness.engine.say(said)
    text, tokens = await lists(client, stream=False, stop=stop)
    assert (text, tokens) == await lists(client, stream=True, stop=stop)
    plain = said.replace("<|im_end|>", "").replace("<|im_start|>", "")
    assert text == next((plain.partition(each)[0] for each in stop if each in plain), plain)
    offsets = [offset for *_, offset in tokens]
    assert offsets == sorted(offsets)
    assert all(offset < len(text) for offset in offsets)
    ids = harness.engine.encode(said)
    data = b"".join(harness.services.tokenizer.token_bytes(token) for token in ids[: len(tokens)])
    assert data.decode(errors="ignore").replace("<|im_end|>", "").replace("<|im_start|>", "").startswith(text)
    for name, _, _, offset in tokens:
        if not name.startswith(("bytes:", "<|")):
            assert plain[offset:].startswith(name)


@pytest.mark.parametrize("case", CASES)
async def test_bytes_of_a_chat_make_its_text(client: httpx.AsyncClient, harness: Harness, case: str) -> None:
    """`bytes` put together are the text, whatever characters the tokens break; and a stream says the same."""
    said, stop = CASES[case]
    harness.engine.say(said)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "stop": stop}
    (choice,) = (await client.post("/v1/chat/completions", json=body)).json()["choices"]
    content = choice["logprobs"]["content"]
    data = b"".join(bytes(token["bytes"]) for token in content)
    data = data.replace(b"<|im_end|>", b"").replace(b"<|im_start|>", b"")
    assert data.startswith(choice["message"]["content"].encode())
    chunks = events((await client.post("/v1/chat/completions", json={**body, "stream": True})).text)
    streamed = [
        token
        for chunk in chunks
        for choice in chunk["choices"]
        for token in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content
