"""What the OpenAPI document says of answers is what they are, and nothing is answered that it does not name."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from fakes import Harness
from in_process_encoder import InProcess
from tiny_encoder import make_encoder
from transformers import PreTrainedTokenizerFast

from adapters_store.store import AdapterStore
from server.app import create_app
from server.config import RoutingSettings, Settings
from server.tools.form import HERMES

HI = {"role": "user", "content": "Hi"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {}}}}}
MIX = {"adapters": [{"name": "sql", "weight": 0.5}, {"name": "german", "weight": 0.5}], "explain": True}
ASKED: list[tuple[str, str, dict[str, Any] | None]] = [
    ("GET", "/v1/models", None),
    ("GET", "/v1/models?limit=1", None),
    ("GET", "/v1/models?limit=0", None),
    ("GET", "/v1/models/sql", None),
    ("GET", "/v1/models/encoder", None),
    ("GET", "/v1/models/nobody", None),
    ("POST", CHAT, {"model": "tiny", "messages": [HI]}),
    ("POST", CHAT, {"model": "tiny", "messages": [HI], "logprobs": True, "top_logprobs": 2, "n": 2, "lora": MIX}),
    ("POST", CHAT, {"model": "tiny", "messages": [HI], "prompt_logprobs": 1, "max_tokens": 2}),
    ("POST", CHAT, {"model": "auto", "messages": [HI], "lora": {"explain": True}}),
    ("POST", CHAT, {"model": "tiny", "messages": [{**HI, "content": "weather"}], "tools": [TOOL]}),
    ("POST", CHAT, {"model": "nobody", "messages": [HI]}),
    ("POST", CHAT, {"model": "tiny", "messages": [HI], "timeout": 1e-9}),
    ("POST", TEXT, {"model": "pirate", "prompt": ["Hi", "Ho"], "logprobs": 1, "echo": True}),
    ("POST", TEXT, {"model": "tiny", "prompt": "Hi", "max_tokens": 0, "prompt_logprobs": 2}),
    ("POST", "/v1/embeddings", {"model": "encoder", "input": ["a", "b"]}),
    ("POST", "/v1/embeddings", {"model": "tiny", "input": "a", "encoding_format": "base64"}),
    ("POST", "/tokenize", {"prompt": "Hi", "return_token_strs": True}),
    ("POST", "/tokenize", {"messages": [HI]}),
    ("POST", "/detokenize", {"tokens": [5, 6]}),
    ("POST", "/detokenize", {"tokens": ["a"]}),
    ("GET", "/health", None),
    ("GET", "/version", None),
    ("GET", "/metrics", None),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def document() -> Any:
    return create_app(Settings()).openapi()


@pytest.fixture
async def harness(store: AdapterStore, tokenizer: PreTrainedTokenizerFast, folder: Path) -> AsyncIterator[Harness]:
    harness = Harness(store, tokenizer, Settings(routing=RoutingSettings(encoder=str(folder))), InProcess(folder))
    yield harness
    harness.check_all_given_back()


def strict(schema: Any) -> Any:
    """The schema, of which an answer may have no other fields."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(inner) for name, inner in schema.items()}
    return closed | {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else closed


@pytest.mark.parametrize(("method", "url", "body"), ASKED, ids=lambda value: json.dumps(value)[:60])
async def test_answers_are_as_documented(
    client: httpx.AsyncClient, harness: Harness, document: Any, method: str, url: str, body: dict[str, Any] | None
) -> None:
    if body is not None and "tools" in body:
        harness.engine.say(HERMES.write("weather", {"city": "Rome"}))
    path = "/v1/models/{model}" if url.startswith("/v1/models/") else url.partition("?")[0]
    documented = document["paths"][path][method.lower()]["responses"]
    answer = await client.request(method, url, json=body)
    status = str(answer.status_code)
    content = (documented.get(status) or documented[f"{status[0]}XX"])["content"]
    media_type = answer.headers["content-type"].partition(";")[0]
    schema = strict({"$ref": "#/s", "s": content[media_type]["schema"], "components": document["components"]})
    jsonschema.validate(answer.json() if media_type == "application/json" else answer.text, schema)


def test_no_answer_is_undocumented(document: Any) -> None:
    """Every operation says what it answers when it does, and that it may refuse what it was given."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            responses = operation["responses"]
            good = [answer for status, answer in responses.items() if status.startswith("2")]
            assert good, (method, path)
            for answer in good:
                assert all(each["schema"] for each in answer["content"].values()), (method, path)
            assert "422" not in responses, "the framework's own form of errors is not ours"
            if path not in ("/health", "/health/decode", "/ready", "/version"):
                assert "4XX" in responses, (method, path)
