"""POST /v1/chat/completions."""

import json

import httpx
import pytest
from byte_tokenizer import TEMPLATE, byte_level_tokenizer
from fake_engine import REPLY
from fakes import Harness, events

from adapters_store.store import AdapterStore
from server.config import Settings

MESSAGES = [{"role": "user", "content": "Hi"}]
URL = "/v1/chat/completions"


async def post(client: httpx.AsyncClient, **fields: object) -> httpx.Response:
    response = await client.post(URL, json={"model": "tiny", "messages": MESSAGES, **fields})
    assert response.status_code == 200, response.text
    return response


async def test_whole_answer(client: httpx.AsyncClient, harness: Harness) -> None:
    response = await post(client)
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": REPLY}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    (request,) = harness.engine.requests
    num_output = len(harness.engine.encode(REPLY))
    assert body["usage"] == {
        "prompt_tokens": len(request.prompt),
        "completion_tokens": num_output,
        "total_tokens": len(request.prompt) + num_output,
        "prompt_tokens_details": {"cached_tokens": 16 if len(request.prompt) > 16 else 0},
    }
    assert body["lora"] == {
        "router": None,
        "composition": "mixture",
        "cached": False,
        "route_ms": body["lora"]["route_ms"],
        "adapters": [],
    }
    assert json.loads(response.headers["x-loramux-route"]) == body["lora"]
    assert response.headers["x-request-id"]


async def test_stream_adds_up_to_the_whole(client: httpx.AsyncClient) -> None:
    response = await post(client, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == REPLY
    assert deltas[-1] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert [index for index, chunk in enumerate(chunks) if "lora" in chunk] == [len(chunks) - 1]
    assert chunks[-1]["lora"]["adapters"] == []
    assert not any("usage" in chunk for chunk in chunks)


async def test_stream_with_usage(client: httpx.AsyncClient) -> None:
    whole = (await post(client)).json()
    chunks = events((await post(client, stream=True, stream_options={"include_usage": True})).text)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert "lora" in chunks[-1]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_n_choices_have_their_own_seeds(client: httpx.AsyncClient, harness: Harness) -> None:
    words = ["alpha", "beta", "gamma"]
    harness.engine.answer(lambda request: harness.engine.encode(words[request.params.seed - 7]))
    body = (await post(client, n=3, seed=7)).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == words
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["prompt_tokens"] == len(harness.engine.requests[0].prompt)
    assert body["usage"]["completion_tokens"] == sum(len(harness.engine.encode(word)) for word in words)


async def test_n_choices_streamed(client: httpx.AsyncClient, harness: Harness) -> None:
    words = ["alpha", "beta"]
    harness.engine.answer(lambda request: harness.engine.encode(words[request.params.seed]))
    chunks = events((await post(client, n=2, seed=0, stream=True)).text)
    for index, word in enumerate(words):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in mine) == word
        assert mine[-1]["finish_reason"] == "stop"
    assert [("lora" in chunk) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


async def test_choices_wait_for_the_first_prefill(client: httpx.AsyncClient, harness: Harness) -> None:
    """With a prompt of several blocks the others come when the first one's prompt is cached."""
    submitted_before_first_token: list[int] = []

    def script(_: object) -> list[int]:
        submitted_before_first_token.append(len(harness.engine.requests))
        return harness.engine.encode("word")

    harness.engine.answer(script)
    await post(client, n=3, messages=[{"role": "user", "content": "A long prompt. " * 5}])
    assert submitted_before_first_token[0] == 1
    assert len(harness.engine.requests) == 3


async def test_without_a_seed_every_request_draws_another(client: httpx.AsyncClient, harness: Harness) -> None:
    for _ in range(4):
        await post(client)
    seeds = {request.params.seed for request in harness.engine.requests}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


async def test_negative_seeds_are_taken(client: httpx.AsyncClient, harness: Harness) -> None:
    await post(client, seed=-1, n=2)
    assert {request.params.seed for request in harness.engine.requests} == {2**63 - 1, 0}


async def test_logprobs(client: httpx.AsyncClient, harness: Harness) -> None:
    harness.engine.say("né")
    (choice,) = (await post(client, logprobs=True, top_logprobs=2)).json()["choices"]
    content = choice["logprobs"]["content"]
    tokens = harness.engine.encode("né")
    assert len(content) == len(tokens)
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == "né"
    assert all(token["logprob"] == -0.5 for token in content)
    assert [len(token["top_logprobs"]) for token in content] == [2] * len(tokens)
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]
    assert [other["logprob"] for other in content[0]["top_logprobs"]] == [-0.5, -1.5]


async def test_streamed_logprobs_equal_whole_ones(client: httpx.AsyncClient, harness: Harness) -> None:
    harness.engine.say("Größe 漢字 😀 fine STOP more")
    options = {"logprobs": True, "top_logprobs": 1, "stop": [" STOP"]}
    (whole,) = (await post(client, **options)).json()["choices"]
    chunks = events((await post(client, stream=True, **options)).text)
    streamed = [
        token
        for chunk in chunks
        if chunk["choices"][0]["logprobs"] is not None
        for token in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == whole["logprobs"]["content"]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["message"]["content"] == "Größe 漢字 😀 fine"
    assert b"".join(bytes(token["bytes"]) for token in streamed).decode() == text


async def test_stop_string_ends_the_request_in_the_engine(client: httpx.AsyncClient, harness: Harness) -> None:
    harness.engine.say("one two STOP three four five")
    body = (await post(client, stop="STOP")).json()
    assert body["choices"][0]["message"]["content"] == "one two "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len(harness.engine.encode("one two STOP"))
    assert list(harness.engine.ended.values()) == ["closed"]
    assert harness.endings() == {"stop": 1.0}


async def test_stop_string_at_the_very_end(client: httpx.AsyncClient, harness: Harness) -> None:
    harness.engine.say("one ST")
    body = (await post(client, stop=["STOP", "###"])).json()
    assert body["choices"][0]["message"]["content"] == "one ST"


async def test_stop_strings_wait_for_min_tokens(client: httpx.AsyncClient, harness: Harness) -> None:
    harness.engine.say("a b a b")
    tokens = harness.engine.encode("a b a b")
    body = (await post(client, stop="b", min_tokens=len(harness.engine.encode("a b")))).json()
    assert body["choices"][0]["message"]["content"] == "a b a "
    assert body["usage"]["completion_tokens"] == len(tokens)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_length(client: httpx.AsyncClient, harness: Harness, field: str) -> None:
    body = (await post(client, **{field: 3})).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3
    assert harness.engine.requests[0].params.max_tokens == 3


async def test_without_a_length_the_context_is_the_limit(client: httpx.AsyncClient, harness: Harness) -> None:
    await post(client)
    (request,) = harness.engine.requests
    assert request.params.max_tokens == 256 - len(request.prompt)


async def test_sampling_parameters_reach_the_engine(client: httpx.AsyncClient, harness: Harness) -> None:
    await post(
        client,
        temperature=0,
        top_p=0.5,
        top_k=7,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1.5,
        repetition_penalty=1.2,
        logit_bias={"5": 2, "6": -100},
        stop_token_ids=[3],
        ignore_eos=True,
        min_tokens=2,
        seed=11,
    )
    params = harness.engine.requests[0].params
    assert params.greedy
    assert (params.top_p, params.top_k, params.min_p) == (0.5, 7, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1.0, -1.5, 1.2)
    assert params.logit_bias == {5: 2.0, 6: -100.0}
    assert (params.stop_token_ids, params.ignore_eos, params.min_tokens) == (frozenset({3}), True, 2)
    assert (params.seed, params.logprobs) == (11, None)


async def test_defaults_sample_from_the_models_own_distribution(client: httpx.AsyncClient, harness: Harness) -> None:
    await post(client, temperature=None, top_p=None, top_k=-1, n=None, stop=None, user=None, tools=None, made_up=1)
    params = harness.engine.requests[0].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)


async def test_the_template_is_applied_without_a_second_begin_token(
    client: httpx.AsyncClient, harness: Harness
) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await post(client, messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
    assert list(harness.engine.requests[0].prompt) == harness.engine.encode(text)


async def test_variables_of_the_template_reach_it(store: AdapterStore) -> None:
    template = "{{ '' if thinking | default(true) else 'In short.' }}" + TEMPLATE
    harness = Harness(store, byte_level_tokenizer(template), Settings())
    asked = {"model": "tiny", "messages": MESSAGES, "chat_template_kwargs": {"thinking": False}}
    async with harness.client() as client:
        counted = await client.post("/tokenize", json=asked)
        assert (await client.post(URL, json=asked)).status_code == 200
    prompt = list(harness.engine.requests[0].prompt)
    assert prompt[: len(harness.engine.encode("In short."))] == harness.engine.encode("In short.")
    assert counted.json()["tokens"] == prompt


async def test_special_tokens_as_vllm_has_them_by_default(client: httpx.AsyncClient, harness: Harness) -> None:
    await post(client, add_special_tokens=False)
    await post(client)
    asked = {"model": "tiny", "prompt": "Hi", "add_special_tokens": True}
    assert (await client.post("/v1/completions", json=asked)).status_code == 200
    given, plain, text = (list(request.prompt) for request in harness.engine.requests)
    assert given == plain
    assert text == [0, *harness.engine.encode("Hi")]  # the token that begins texts


async def test_request_ids_are_echoed_or_made(client: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "messages": MESSAGES}
    echoed = await client.post(URL, json=body, headers={"x-request-id": "my-id.7"})
    assert echoed.headers["x-request-id"] == "my-id.7"
    replaced = await client.post(URL, json=body, headers={"x-request-id": "x" * 500})
    assert len(replaced.headers["x-request-id"]) == 32
