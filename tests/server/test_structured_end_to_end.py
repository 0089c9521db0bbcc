"""Structured output over a real socket, from a process with a real engine: every answer is of its language."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import httpx
import jsonschema
import pytest
from byte_tokenizer import byte_level_tokenizer
from openai import OpenAI
from pydantic import BaseModel, Field
from served import Served

MESSAGES = [{"role": "user", "content": "Hello world"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    age: int = Field(ge=0, le=30)


class Owner(BaseModel):
    pets: list[Pet] = Field(max_length=2)
    rich: bool | None


@pytest.fixture(scope="module")
def served(served_model: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("adapters-to-serve")
    for name in ("all4", "qv16"):
        shutil.copytree(adapters[name], root / name)
    served = Served(served_model, tmp_path_factory.mktemp("data"), "--adapters", str(root))
    yield served
    assert served.stop() == 0


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=served.base_url, api_key="none", max_retries=0) as client:
        yield client


def schema_format(schema: dict[str, object]) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


@pytest.mark.parametrize("model", ["tiny", "all4"])
def test_a_json_schema_holds_for_every_choice(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, n=4, seed=1, max_tokens=400, response_format=schema_format(PERSON)
    )
    texts = [choice.message.content or "" for choice in answer.choices]
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 4
    assert len(set(texts)) > 1


def test_streams_say_the_same(client: OpenAI) -> None:
    asked = {"model": "qv16", "messages": MESSAGES, "seed": 2, "max_tokens": 400}
    asked |= {"response_format": schema_format(PERSON), "logprobs": True}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    jsonschema.validate(json.loads(text), PERSON)


def test_the_parse_helper_gives_pydantic_models(client: OpenAI) -> None:
    parsed = (
        client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Owner, seed=3, max_tokens=300)
        .choices[0]
        .message.parsed
    )
    assert isinstance(parsed, Owner)
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, response_format=Owner, seed=3, max_tokens=300
    ) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == parsed


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": "[ab]{3,5}-[0-9]"}, "[ab]{3,5}-[0-9]"),
        ({"choice": ["yes", "no", "möglich"]}, "yes|no|möglich"),
        ({"grammar": 'start: WORD (" " WORD){2}\nWORD: "x" | "yy"'}, "(x|yy)( (x|yy)){2}"),
        ({"json": {"enum": [1, "b", None]}}, '1|"b"|null'),
        ({"json": '{"const": {"a": []}}'}, r'\{\s*"a"\s*:\s*\[\s*\]\s*\}'),
    ],
)
def test_structured_outputs(client: OpenAI, outputs: dict[str, object], pattern: str) -> None:
    answer = client.completions.create(
        model="tiny", prompt="Hello", temperature=0, max_tokens=60, extra_body={"structured_outputs": outputs}
    )
    assert re.fullmatch(pattern, answer.choices[0].text), answer.choices[0].text
    assert answer.choices[0].finish_reason == "stop"


def test_a_json_object_is_cut_by_max_tokens(client: OpenAI) -> None:
    never_closed = {str(byte_level_tokenizer().convert_tokens_to_ids("}")): -100}
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=3,
        response_format={"type": "json_object"},
        logit_bias=never_closed,  # type: ignore[arg-type]
    )
    assert (answer.choices[0].message.content or "").startswith("{")
    assert answer.choices[0].finish_reason == "length"


HOSTILE = [
    ("response_format.json_schema.schema", schema_format({"$ref": "#"})),
    (
        "response_format.json_schema.schema",
        schema_format({"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}),
    ),
    ("response_format.json_schema.schema", schema_format({"$ref": "http://127.0.0.1:9/schema.json"})),
    ("response_format.json_schema.schema", schema_format({"$ref": "file:///etc/passwd"})),
    ("response_format.json_schema.schema", schema_format({"type": "object", "if": {"required": ["a"]}})),
    ("response_format.json_schema.schema", schema_format({"type": "integer", "minimum": 3, "maximum": 2})),
    ("response_format.json_schema.schema", schema_format({"type": "string", "pattern": "(?=a)b"})),
    ("structured_outputs.regex", {"regex": "((a{1000}){1000}){1000}"}),
    ("structured_outputs.regex", {"regex": "(" * 60_000 + "a" + ")" * 60_000}),
    ("structured_outputs.regex", {"regex": "("}),
    ("structured_outputs.grammar", {"grammar": 'start: "a" start'}),
    ("structured_outputs.grammar", {"grammar": "start: " + "(" * 60_000}),
    ("structured_outputs.json", {"json": json.dumps({"patternProperties": {f"^p{i}x": {} for i in range(600)}})}),
    ("structured_outputs.json", {"json": "{"}),
    ("structured_outputs.json", {"json": '{"not": {}}'}),
    ("structured_outputs.json", {"json": "[" * 50_000}),
]


@pytest.mark.parametrize(("param", "field", "stream"), [(*each, index % 3 == 0) for index, each in enumerate(HOSTILE)])
def test_what_cannot_be_is_refused(served: Served, param: str, field: dict[str, object], stream: bool) -> None:
    name = param.partition(".")[0]
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 5, "n": 2, "stream": stream, name: field}
    answer = httpx.post(f"{served.base_url}/chat/completions", json=body, timeout=120)
    has_begun = answer.headers["content-type"].startswith("text/event-stream")  # a slow machine, a silent stream
    text = answer.text.replace(": keep-alive\n\n", "").removeprefix("data: ") if has_begun else answer.text
    error = json.loads(text)["error"]
    assert answer.status_code == (200 if has_begun else 400), error
    assert (error["param"], error["code"]) == (param, "invalid_constraint"), error
    assert len(error["message"]) < 400
    served.until(lambda: served.metric("loramux_requests_running") == 0)
