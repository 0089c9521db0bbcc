"""POST /v1/completions."""

import httpx
import pytest
from fake_engine import REPLY
from fakes import Harness, events

from server.engine.sequence import TokenLogprobs

URL = "/v1/completions"


async def post(client: httpx.AsyncClient, **fields: object) -> httpx.Response:
    response = await client.post(URL, json={"model": "tiny", "prompt": "Hi", **fields})
    assert response.status_code == 200, response.text
    return response


async def test_whole_answer(client: httpx.AsyncClient, harness: Harness) -> None:
    body = (await post(client)).json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": REPLY, "logprobs": None, "finish_reason": "stop"}]
    assert list(harness.engine.requests[0].prompt) == [0, *harness.engine.encode("Hi")]
    assert body["lora"]["adapters"] == []


async def test_stream_adds_up_to_the_whole(client: httpx.AsyncClient) -> None:
    chunks = events((await post(client, stream=True, stream_options={"include_usage": True})).text)
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == REPLY
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    assert "lora" in chunks[-1]


async def test_a_begin_token_in_the_text_is_not_doubled(client: httpx.AsyncClient, harness: Harness) -> None:
    await post(client, prompt="<s>Hi")
    assert list(harness.engine.requests[0].prompt) == [0, *harness.engine.encode("Hi")]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("one", ["one"]),
        (["one", "two"], ["one", "two"]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
async def test_prompt_forms(
    client: httpx.AsyncClient, harness: Harness, prompt: object, expected: list[str | list[int]]
) -> None:
    body = (await post(client, prompt=prompt)).json()
    wanted = [[0, *harness.engine.encode(one)] if isinstance(one, str) else one for one in expected]
    sent = {request.id.rpartition("-")[2]: list(request.prompt) for request in harness.engine.requests}
    assert [sent[str(index)] for index in range(len(wanted))] == wanted
    assert [choice["index"] for choice in body["choices"]] == list(range(len(wanted)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, wanted))


async def test_best_of_answers_with_the_likeliest_candidates(
    client: httpx.AsyncClient, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds 3 to 6 say 0 to 3 letters more; b is likelier than a, and its mean counts, not its sum."""
    said = {3: "a", 4: "bbbb", 5: "ab", 6: "aab"}
    values = {harness.engine.encode(letter)[0]: value for letter, value in (("a", -2.0), ("b", -1.0))}
    harness.engine.answer(
        lambda request: [harness.engine.encode(letter)[0] for letter in said[request.params.seed or 0]]
    )
    monkeypatch.setattr(harness.engine, "_logprobs", lambda token, _: TokenLogprobs(values[token], ()))
    asked = {"prompt": [[50], [60, 61]], "seed": 3, "best_of": 4}
    body = (await post(client, **asked, n=2)).json()
    assert [choice["text"] for choice in body["choices"]] == ["bbbb", "ab"] * 2
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["logprobs"] for choice in body["choices"]] == [None] * 4
    assert body["usage"]["completion_tokens"] == 2 * sum(map(len, said.values())), "all candidates"
    assert body["usage"]["prompt_tokens"] == 3
    (first, second) = (await post(client, **asked, n=1, echo=True, logprobs=0)).json()["choices"]
    assert first["text"] == f"{harness.services.tokenizer.token_bytes(50).decode()}bbbb"
    assert second["logprobs"]["token_logprobs"][-4:] == [-1.0] * 4
    assert [choice["text"] for choice in (await post(client, **asked, n=4)).json()["choices"][:2]] == ["a", "bbbb"]


async def test_best_of_as_many_as_are_answered_may_be_streamed(client: httpx.AsyncClient) -> None:
    chunks = events((await post(client, n=2, best_of=2, stream=True)).text)
    assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == {0, 1}


async def test_prompts_times_n(client: httpx.AsyncClient, harness: Harness) -> None:
    harness.engine.answer(lambda request: harness.engine.encode(f"{request.prompt[0]} {request.params.seed}"))
    body = (await post(client, prompt=[[50], [60]], n=2, seed=3)).json()
    assert [choice["text"] for choice in body["choices"]] == ["50 3", "50 4", "60 3", "60 4"]
    assert body["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_echo(client: httpx.AsyncClient, stream: bool) -> None:
    response = await post(client, prompt=["One: ", "Größe "], n=2, echo=True, stream=stream)
    texts = ["", "", "", ""]
    bodies = events(response.text) if stream else [response.json()]
    for body in bodies:
        for choice in body["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [f"One: {REPLY}"] * 2 + [f"Größe {REPLY}"] * 2


async def test_echo_of_token_ids(client: httpx.AsyncClient, harness: Harness) -> None:
    body = (await post(client, prompt=[0, *harness.engine.encode("Hi there")], echo=True)).json()
    assert body["choices"][0]["text"] == f"Hi there{REPLY}"


async def test_logprobs(client: httpx.AsyncClient, harness: Harness) -> None:
    harness.engine.say("ok 漢 ok")
    body = (await post(client, logprobs=1)).json()
    logprobs = body["choices"][0]["logprobs"]
    tokens = harness.engine.encode("ok 漢 ok")
    assert len(logprobs["tokens"]) == len(tokens) == len(logprobs["text_offset"])
    assert logprobs["token_logprobs"] == [-0.5] * len(tokens)
    assert logprobs["top_logprobs"] == [{name: -0.5} for name in logprobs["tokens"]]
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    for name, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not name.startswith("bytes:"):
            assert body["choices"][0]["text"][offset:].startswith(name)


async def test_logprobs_name_parts_of_characters_by_their_bytes(client: httpx.AsyncClient, harness: Harness) -> None:
    (whole,) = harness.engine.encode("é")[:1]
    halves = [harness.services.tokenizer._backend.token_to_id(character) for character in ("Ã", "©")]
    assert whole not in halves
    harness.engine.answer(lambda _: halves)
    logprobs = (await post(client, logprobs=0)).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs["text_offset"] == [0, 0]
    assert logprobs["top_logprobs"] == [{name: -0.5} for name in logprobs["tokens"]]


async def test_leading_spaces_stay(client: httpx.AsyncClient, harness: Harness) -> None:
    harness.engine.say(" world")
    assert (await post(client, prompt="Hello")).json()["choices"][0]["text"] == " world"


async def test_special_tokens_have_no_text(client: httpx.AsyncClient, harness: Harness) -> None:
    end = harness.services.tokenizer._backend.token_to_id("<|im_end|>")
    harness.engine.answer(lambda _: [*harness.engine.encode("a"), end, *harness.engine.encode("b")])
    body = (await post(client, ignore_eos=True)).json()
    assert body["choices"][0]["text"] == "ab"
    assert body["usage"]["completion_tokens"] == 3
