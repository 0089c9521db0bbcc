"""Log-probabilities of prompts: echoed with the answer, and in vLLM's form."""

import httpx
import pytest
from fake_engine import REPLY
from fakes import Harness, events
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from server.chat import ChatTokenizer
from server.openai import answer as answers
from server.openai.prompt_scores import by_name, text_offsets

URL = "/v1/completions"
LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


async def post(client: httpx.AsyncClient, url: str = URL, **fields: object) -> httpx.Response:
    response = await client.post(url, json={"model": "tiny", **({"prompt": "Hi"} if url == URL else {}), **fields})
    assert response.status_code == 200, response.text
    return response


async def test_the_prompt_alone_as_evaluation_harnesses_ask_for_it(client: httpx.AsyncClient, harness: Harness) -> None:
    """Several prompts as token ids, echo, log-probabilities, no answer."""
    prompts = [[0, *harness.engine.encode("One fine day")], [7]]
    body = (await post(client, prompt=prompts, echo=True, logprobs=2, max_tokens=0, temperature=0)).json()
    first, second = body["choices"]
    assert (first["text"], first["finish_reason"]) == ("One fine day", "length")
    lists = first["logprobs"]
    assert {len(lists[name]) for name in LISTS} == {len(prompts[0])}
    assert lists["token_logprobs"] == [None, *(-place / 4 for place in range(1, len(prompts[0])))]
    assert lists["top_logprobs"][0] is None
    for place, (name, top) in enumerate(zip(lists["tokens"][1:], lists["top_logprobs"][1:], strict=True), 1):
        assert top[name] == -place / 4
        assert len(top) == 3
    assert lists["tokens"][0] == "<s>"
    assert "".join(lists["tokens"][1:]) == "One fine day"
    assert second["logprobs"]["token_logprobs"] == second["logprobs"]["top_logprobs"] == [None]
    assert body["usage"] == {
        "prompt_tokens": len(prompts[0]) + 1,
        "completion_tokens": 0,
        "total_tokens": len(prompts[0]) + 1,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert [request.params.max_tokens for request in harness.engine.requests] == [0, 0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
async def test_echo_and_answer_are_one_text(
    client: httpx.AsyncClient, harness: Harness, stream: bool, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token lies where its offset says, in the prompt and behind it; whether a thread writes them or not."""
    monkeypatch.setattr(answers, "IN_THREAD", 5)
    prompts = ["Größe 漢: ", "An <|im_end|> spelled out, and much more of it. "]
    response = await post(client, prompt=prompts, n=n, echo=True, logprobs=1, stream=stream)
    texts, lists = [""] * 2 * n, [{name: [] for name in LISTS} for _ in range(2 * n)]
    for body in events(response.text) if stream else [response.json()]:
        for choice in body["choices"]:
            texts[choice["index"]] += choice["text"]
            for name in LISTS:
                lists[choice["index"]][name] += choice["logprobs"][name]
    reply = harness.engine.encode(REPLY)
    for index, (text, own) in enumerate(zip(texts, lists, strict=True)):
        prompt = prompts[index // n]
        assert text == prompt + REPLY
        count = len(harness.engine.encode(prompt)) + 1
        assert {len(own[name]) for name in LISTS} == {count + len(reply)}
        assert own["token_logprobs"][1:count] == [-place / 4 for place in range(1, count)]
        assert own["token_logprobs"][count:] == [-0.5] * len(reply)
        assert own["text_offset"] == sorted(own["text_offset"])
        for name, offset in zip(own["tokens"][1:], own["text_offset"][1:], strict=True):
            if not name.startswith("bytes:"):
                assert text[offset:].startswith(name)
    asked = [request.params.prompt_logprobs for request in harness.engine.requests]
    assert sorted(asked, key=str) == [1, 1] + [None] * (2 * n - 2), "one choice scores the prompt for all"


async def test_vllm_form_of_a_completion(client: httpx.AsyncClient, harness: Harness) -> None:
    prompt = [0, *harness.engine.encode("One fine day")]
    body = (await post(client, prompt=prompt, prompt_logprobs=1, n=2)).json()
    for choice in body["choices"]:
        assert choice["logprobs"] is None
        assert choice["text"] == REPLY
        first, *others = choice["prompt_logprobs"]
        assert first is None
        assert len(others) == len(prompt) - 1
        for place, (token, entry) in enumerate(zip(prompt[1:], others, strict=True), 1):
            named = harness.services.tokenizer.token_bytes
            assert entry == {
                str(token): {"logprob": -place / 4, "rank": 3, "decoded_token": named(token).decode()},
                "20": {"logprob": -0.5, "rank": 1, "decoded_token": named(20).decode()},
            }


async def test_vllm_form_without_alternatives(client: httpx.AsyncClient) -> None:
    (choice,) = (await post(client, prompt=[5, 6, 7], prompt_logprobs=0)).json()["choices"]
    entries = [list(entry) for entry in choice["prompt_logprobs"][1:]]
    assert entries == [["6"], ["7"]]
    assert choice["prompt_logprobs"][2]["7"]["logprob"] == -0.5
    assert choice["prompt_logprobs"][2]["7"]["rank"] == 3


async def test_a_likely_token_counts_once(client: httpx.AsyncClient) -> None:
    (choice,) = (await post(client, prompt=[5, 20], prompt_logprobs=2)).json()["choices"]
    assert choice["prompt_logprobs"][1].keys() == {"20", "21"}


async def test_more_scores_than_one_answer_holds(client: httpx.AsyncClient, harness: Harness) -> None:
    fields = {"model": "tiny", "prompt": [[5] * 200] * 128, "max_tokens": 0}
    refused = await client.post(URL, json={**fields, "prompt_logprobs": 10})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "too_many_logprobs"
    assert not harness.engine.requests
    assert (await client.post(URL, json={**fields, "prompt_logprobs": 1})).status_code == 200


async def test_vllm_form_of_a_chat(client: httpx.AsyncClient, harness: Harness) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    body = (await post(client, "/v1/chat/completions", messages=messages, prompt_logprobs=2)).json()
    assert len(body["prompt_logprobs"]) == len(harness.engine.requests[0].prompt) == body["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in body["choices"][0]
    plain = (await post(client, "/v1/chat/completions", messages=messages)).json()
    assert "prompt_logprobs" not in plain


async def test_an_echo_and_vllms_form_may_differ_in_number(client: httpx.AsyncClient, harness: Harness) -> None:
    body = (await post(client, prompt=[5, 6], echo=True, logprobs=3, prompt_logprobs=1)).json()
    (choice,) = body["choices"]
    assert len(choice["prompt_logprobs"][1]) == 2
    assert len(choice["logprobs"]["top_logprobs"][1]) == 4
    assert harness.engine.requests[0].params.prompt_logprobs == 3


async def test_scores_without_an_echo_leave_the_text_alone(client: httpx.AsyncClient) -> None:
    (choice,) = (await post(client, prompt=[5, 6], logprobs=1, prompt_logprobs=1)).json()["choices"]
    assert choice["text"] == REPLY
    assert choice["logprobs"]["text_offset"][0] == 0
    assert None not in choice["logprobs"]["token_logprobs"]


@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40), special=st.booleans())
def test_offsets_lie_where_the_tokens_are(tokenizer: PreTrainedTokenizerFast, text: str, special: bool) -> None:
    """Each token is found at its place; tokens within one character all begin where it does."""
    text = f"{text}<|im_start|>{text}" if special else text
    chat = ChatTokenizer(tokenizer)
    prompt = chat._encode(text, True)
    offsets, data = text_offsets(chat, prompt, text), b""
    for token, offset in zip(prompt[1:], offsets[1:], strict=True):
        assert offset == len(data.decode(errors="ignore"))
        data += chat.token_bytes(token)
    assert data.decode() == text


def test_of_two_tokens_with_one_name_the_likelier_counts() -> None:
    """A harness that compares a token with the likeliest must not take another one of its name for it."""
    assert by_name([("a", -0.1), ("b", -1.0), ("a", -3.0)]) == {"a": -0.1, "b": -1.0}
