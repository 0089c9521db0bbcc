"""POST /v1/embeddings beside sentence-transformers itself, with a tiny encoder in this process."""

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from fake_engine import pooled_row
from fakes import MODEL, Harness
from in_process_encoder import InProcess
from openai import AsyncOpenAI
from sentence_transformers import SentenceTransformer
from tiny_encoder import MAX_TOKENS, WIDTH, make_encoder
from transformers import PreTrainedTokenizerFast

from adapters_store.registry import Quotas, TenantRow
from adapters_store.store import AdapterStore
from routing.encoder_tokenizer import EncoderTokenizer
from server.config import RoutingSettings, Settings
from server.openai import embeddings as module

TEXTS = ["what is 7 * 8?", "translate to french: good morning", "what is 7 * 8?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def original(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture
def encoder(folder: Path) -> InProcess:
    return InProcess(folder)


@pytest.fixture
async def harness(
    store: AdapterStore, tokenizer: PreTrainedTokenizerFast, encoder: InProcess
) -> AsyncIterator[Harness]:
    settings = Settings(routing=RoutingSettings(encoder=str(encoder.folder)))
    harness = Harness(store, tokenizer, settings, encoder)
    yield harness
    harness.check_all_given_back()
    assert harness.services.quotas.running("default") == 0


@pytest.fixture
async def official(live: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_the_official_client_gets_the_librarys_vectors(
    official: AsyncOpenAI, original: SentenceTransformer, encoder: InProcess
) -> None:
    expected = original.encode(TEXTS)
    for form in ({}, {"encoding_format": "float"}, {"dimensions": WIDTH}):
        answer = await official.embeddings.create(model="encoder", input=TEXTS, **form)
        np.testing.assert_allclose([entry.embedding for entry in answer.data], expected, atol=1e-6)
        assert [entry.index for entry in answer.data] == [0, 1, 2]
        assert answer.model == "encoder"
        counts = sum(len(original.tokenizer(text)["input_ids"]) for text in TEXTS)
        assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (counts, counts)
    one = await official.embeddings.create(model="encoder", input=TEXTS[0])
    np.testing.assert_allclose(one.data[0].embedding, expected[0], atol=1e-6)
    assert encoder.calls == [(3, True)] * 3 + [(1, False)]


async def test_base64_is_little_endian_float32(client: httpx.AsyncClient, original: SentenceTransformer) -> None:
    body = {"model": "encoder", "input": TEXTS, "encoding_format": "base64"}
    data = (await client.post("/v1/embeddings", json=body)).json()["data"]
    found = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in data]
    np.testing.assert_allclose(found, original.encode(TEXTS), atol=1e-6)


async def test_token_ids_are_those_of_the_encoder(client: httpx.AsyncClient, original: SentenceTransformer) -> None:
    ids = [original.tokenizer(text)["input_ids"] for text in TEXTS]
    plain = [original.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    expected = original.encode(TEXTS)
    for given in (ids, plain):
        answer = (await client.post("/v1/embeddings", json={"model": "encoder", "input": given})).json()
        np.testing.assert_allclose([entry["embedding"] for entry in answer["data"]], expected, atol=1e-6)
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    one = (await client.post("/v1/embeddings", json={"model": "encoder", "input": plain[0]})).json()
    np.testing.assert_allclose(one["data"][0]["embedding"], expected[0], atol=1e-6)


async def test_too_long_texts_are_refused_or_cut(client: httpx.AsyncClient, original: SentenceTransformer) -> None:
    long = "many words " * MAX_TOKENS
    body = {"model": "encoder", "input": ["short", long]}
    refused = await client.post("/v1/embeddings", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert "text 1" in refused.json()["error"]["message"]
    answer = (await client.post("/v1/embeddings", json=body | {"truncate_prompt_tokens": -1})).json()
    np.testing.assert_allclose(answer["data"][1]["embedding"], original.encode(long), atol=1e-6)
    assert answer["usage"]["prompt_tokens"] == len(original.tokenizer("short")["input_ids"]) + MAX_TOKENS


async def test_many_texts_take_turns_with_other_requests(
    client: httpx.AsyncClient, encoder: InProcess, original: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGE", 100)  # written in a thread
    texts = [f"text {number}" for number in range(150)]
    answer = (await client.post("/v1/embeddings", json={"model": "encoder", "input": texts})).json()
    assert encoder.calls == [(64, True), (64, True), (22, True)]
    np.testing.assert_allclose([entry["embedding"] for entry in answer["data"]], original.encode(texts), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "param", "code", "status"),
    [
        ({"model": None}, "model", "invalid_type", 400),
        ({"model": "nobody"}, "model", "model_not_found", 404),
        ({"model": MODEL, "dimensions": 3}, "dimensions", "unsupported_value", 400),
        ({"model": MODEL, "truncate_prompt_tokens": -1}, "truncate_prompt_tokens", "unsupported_value", 400),
        ({"model": MODEL, "input": ["a"] * 129}, "input", "invalid_value", 400),
        ({"model": MODEL, "input": "x" * 5000}, "input", "context_length_exceeded", 400),
        ({"model": MODEL, "input": [10**6]}, "input", "invalid_value", 400),
        ({"input": None}, "input", "invalid_type", 400),
        ({"input": ""}, "input", "invalid_value", 400),
        ({"input": []}, "input", "invalid_type", 400),
        ({"input": ["a", ""]}, "input", "invalid_value", 400),
        ({"input": ["a", 1]}, "input", "invalid_type", 400),
        ({"input": {"text": "a"}}, "input", "invalid_type", 400),
        ({"input": [[1], []]}, "input", "invalid_type", 400),
        ({"input": [-1]}, "input", "invalid_value", 400),
        ({"input": [10**30]}, "input", "invalid_value", 400),
        ({"input": [140, 140]}, "input", "invalid_value", 400),
        ({"input": [5] * 1000}, "input", "context_length_exceeded", 400),
        ({"input": "x" * 1_000_000}, "input", "context_length_exceeded", 400),
        ({"input": ["a"] * 2049}, "input", "invalid_value", 400),
        ({"encoding_format": "hex"}, "encoding_format", "invalid_value", 400),
        ({"dimensions": 8}, "dimensions", "unsupported_value", 400),
        ({"dimensions": 0}, "dimensions", "invalid_value", 400),
        ({"dimensions": "8"}, "dimensions", "invalid_type", 400),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "invalid_value", 400),
        ({"user": 5}, "user", "invalid_type", 400),
    ],
    ids=str,
)
async def test_what_is_refused(
    client: httpx.AsyncClient, encoder: InProcess, fields: dict[str, object], param: str, code: str, status: int
) -> None:
    response = await client.post("/v1/embeddings", json={"model": "encoder", "input": "a"} | fields)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert not encoder.calls


async def test_without_an_encoder_there_is_no_model(make_harness: Callable[..., Harness]) -> None:
    async with make_harness().client() as client:
        response = await client.post("/v1/embeddings", json={"model": "encoder", "input": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
        assert (await client.post("/v1/embeddings", json={"model": MODEL, "input": "a"})).status_code == 200
        assert [model["kind"] for model in (await client.get("/v1/models")).json()["data"]] == ["base"] + [
            "adapter"
        ] * 3


async def test_the_model_is_listed(client: httpx.AsyncClient) -> None:
    models = (await client.get("/v1/models?limit=1")).json()
    assert [model["kind"] for model in models["data"]] == ["base", "embedding", "adapter"]
    assert (models["data"][1]["dimensions"], models["data"][1]["max_model_len"]) == (WIDTH, MAX_TOKENS)
    assert (await client.get("/v1/models/encoder")).json() == models["data"][1]
    rest = (await client.get("/v1/models", params={"cursor": models["next"]})).json()
    assert {model["kind"] for model in rest["data"]} == {"adapter"}


async def test_other_models_give_the_mean_of_their_last_states(
    official: AsyncOpenAI, harness: Harness, encoder: InProcess
) -> None:
    for model, uses in ((MODEL, 0), ("sql", 1)):
        answer = await official.embeddings.create(model=model, input=["Hi", "Hello world"])
        prompts = [request.prompt for request in harness.engine.requests[-2:]]
        sums = [np.sum([pooled_row(token) for token in prompt], axis=0) for prompt in prompts]
        expected = [each / np.linalg.norm(each) for each in sums]
        np.testing.assert_allclose([entry.embedding for entry in answer.data], expected, rtol=1e-6)
        assert answer.usage.total_tokens == sum(map(len, prompts))
        assert answer.model == model
        assert [len(request.mix.entries) for request in harness.engine.requests[-2:]] == [uses, uses]
    ids = await official.embeddings.create(model=MODEL, input=[5, 6])
    assert harness.engine.requests[-1].prompt == (5, 6)
    assert ids.usage.total_tokens == 2
    assert not encoder.calls
    assert harness.endings() == {"length": 5.0}


async def test_a_client_that_leaves_the_engine(live: str, harness: Harness) -> None:
    harness.engine.gate.clear()
    async with httpx.AsyncClient(timeout=60) as client:
        asking = asyncio.create_task(client.post(f"{live}/v1/embeddings", json={"model": "sql", "input": ["a", "b"]}))
        while len(harness.engine.requests) < 2:
            await asyncio.sleep(0.005)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        while len(harness.engine.ended) < 2:
            await asyncio.sleep(0.005)
    assert set(harness.engine.ended.values()) == {"closed"}


async def account(harness: Harness, name: str, **quotas: int) -> dict[str, str]:
    """Headers of a new tenant."""
    await harness.services.accounts.create_tenant(TenantRow(name, quotas=Quotas(**quotas)))
    _, key = await harness.services.accounts.create_key(name)
    return {"Authorization": f"Bearer {key}"}


async def test_tokens_count_against_the_quota_and_in_the_ledger(
    client: httpx.AsyncClient, harness: Harness, encoder: InProcess
) -> None:
    harness.services.quotas.clock = lambda: 100.0
    headers = await account(harness, "reader", tokens_per_minute=60)
    body = {"model": "encoder", "input": "abc def"}
    answer = await client.post("/v1/embeddings", json=body, headers=headers)
    assert encoder.tenants == ["reader"], "what is remembered is remembered for the one who sent it"
    tokens = answer.json()["usage"]["total_tokens"]
    left = f"{60 - tokens}"
    assert answer.headers["x-ratelimit-remaining-tokens"] == left
    encoder.failure = "it died at /secret/path"
    failed = await client.post("/v1/embeddings", json=body, headers=headers)
    assert (failed.status_code, failed.json()["error"]["code"]) == (503, "encoder_unavailable")
    assert "/secret" not in failed.text
    assert failed.headers["x-ratelimit-remaining-tokens"] == left
    refused = await client.post("/v1/embeddings", json=body | {"input": "a" * 61}, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_tokens")
    await harness.services.usage.flush()
    (row,) = harness.store.registry.ledger.read("reader").items
    assert (row.adapter, row.requests, row.prompt_tokens, row.generation_tokens) == ("encoder", 1, tokens, 0)
    metric = f'loramux_embedding_tokens_total{{tenant="reader"}} {float(tokens)}'
    assert metric in (await client.get("/metrics")).text.splitlines()


async def test_a_client_that_leaves_is_not_waited_for(live: str, harness: Harness, encoder: InProcess) -> None:
    encoder.gate.clear()
    async with httpx.AsyncClient(timeout=60) as client:
        body = {"model": "encoder", "input": TEXTS * 100}
        asking = asyncio.create_task(client.post(f"{live}/v1/embeddings", json=body))
        while not encoder.calls:
            await asyncio.sleep(0.005)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        while not encoder.cancelled:
            await asyncio.sleep(0.005)
    assert encoder.calls == [(64, True)]
    while harness.services.quotas.running("default"):
        await asyncio.sleep(0.005)


async def test_while_draining_it_is_refused(client: httpx.AsyncClient, harness: Harness) -> None:
    harness.services.generator.is_draining = True
    response = await client.post("/v1/embeddings", json={"model": "encoder", "input": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")


def test_token_ids_that_are_no_text_have_none(folder: Path) -> None:
    tokenizer = EncoderTokenizer.from_folder(folder)
    assert tokenizer.text([]) == ""
    (count,) = tokenizer.count(["cat"])
    assert count == 5  # three characters and the marks around them
    assert tokenizer.text([140, 140]) is None
