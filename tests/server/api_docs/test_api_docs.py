"""docs/api.md says what the code does."""

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import REPLY
from fakes import Harness

from server.api_docs.document import RESPONSE_LORA, api_document, field_rows
from server.api_docs.error_codes import ERROR_CODES
from server.api_docs.schema_text import described, rows, values
from server.config import LimitSettings
from server.openai.chat import ChatRequest
from server.openai.completions import CompletionRequest
from server.openai.protocol import IGNORED, NOT_SERVED
from server.tenants import DEFAULT_TENANT

ROOT = Path(__file__).parents[3]
CODE = re.compile(r"[a-z]+(_[a-z]+)+")
KINDS = {"NotFound": "not_found", "NameTaken": "exists"}
"""Errors of the registry whose codes begin with their first argument."""
ELSEWHERE = {"store_claimed", "registry_other_model"}
"""What only a start meets."""
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
SAMPLES: dict[str, Any] = {"text": "x", "boolean": True, "object of texts, at most 16": {"a": "b"}, "any": {"x": [1]}}


def test_the_file_is_current() -> None:
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert written == api_document(), "run `python -m server.api_docs docs/api.md`"


def test_every_field_has_one_of_three_statuses_and_values() -> None:
    for model in (ChatRequest, CompletionRequest):
        shown = field_rows(model, NOT_SERVED)
        names = [name for name, *_ in shown]
        assert len(names) == len(set(names))
        assert {f"`{name}`" for name in model.model_fields} <= set(names)
        assert {status for _, _, status, _ in shown} == {"supported", "ignored", "refused"}
        assert all(text for _, text, _, _ in shown)


def ignored() -> list[tuple[str, Any]]:
    found = [
        (name.strip("`"), SAMPLES[shown])
        for name, shown, status, _ in field_rows(ChatRequest)
        if status == "ignored" and not {".", "["} & set(name)
    ]
    return found + [(name, {"any": ["thing"]}) for name in IGNORED]


@pytest.mark.parametrize(("name", "value"), ignored())
def test_ignored_fields_change_nothing(name: str, value: object) -> None:
    plain, more = (
        ChatRequest.parse(body, LimitSettings()).ask(DEFAULT_TENANT) for body in (CHAT, CHAT | {name: value})
    )
    assert asdict(plain) == asdict(more)


@pytest.mark.parametrize("name", NOT_SERVED)
async def test_refused_fields_are_refused_by_name(client: httpx.AsyncClient, harness: Harness, name: str) -> None:
    text = {"model": "tiny", "prompt": "Hi"}
    for url, body, model in (("/v1/chat/completions", CHAT, ChatRequest), ("/v1/completions", text, CompletionRequest)):
        if name in model.model_fields:
            continue
        answer = await client.post(url, json=body | {name: {"some": "thing"}})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", name)
        assert not harness.engine.requests
    for value in NOT_SERVED[name]:
        answer = await client.post("/v1/chat/completions", json=CHAT | {name: value})
        assert answer.json()["choices"][0]["message"]["content"] == REPLY


def test_documented_defaults_are_the_ones() -> None:
    sampling = ChatRequest.parse(CHAT, LimitSettings()).sampling()
    checked = 0
    for name, _, _, notes in field_rows(ChatRequest):
        default = re.match(r"Default (-?[\d.]+)(?:[.,]|$)", notes)
        used = getattr(sampling, name.strip("`"), None)
        if default and isinstance(used, int | float):
            assert float(default[1].rstrip(".")) == used, name
            checked += 1
    assert checked >= 8


def codes() -> Iterator[tuple[str, str]]:
    """Codes that stand in the sources as literals, and where."""
    for package in ("server", "adapters_store", "routing"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                given: list[ast.expr] = []
                if isinstance(node, ast.Call):
                    given = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
                    called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                    given += (
                        node.args[:1]
                        if called.endswith(("Error", "__init__"))
                        and not called.startswith("Pydantic")
                        and node.args[1:]
                        else []
                    )
                    first = getattr(node.args[0], "value", None) if node.args else None
                    if called in KINDS and re.fullmatch("[a-z]+", str(first)):
                        yield f"{first}_{KINDS[called]}", f"{path.relative_to(ROOT)}:{node.lineno}"
                elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "code":
                    given = [node.value]
                for value in given:
                    if isinstance(value, ast.Constant) and CODE.fullmatch(str(value.value)):
                        yield value.value, f"{path.relative_to(ROOT)}:{value.lineno}"


def test_every_error_code_is_explained() -> None:
    known = {each.code for each in ERROR_CODES} | ELSEWHERE
    found = list(codes())
    assert len(found) > 80
    assert not [(code, where) for code, where in found if code not in known]
    assert len({each.code for each in ERROR_CODES}) == len(ERROR_CODES)


async def test_the_lora_object_is_explained(client: httpx.AsyncClient) -> None:
    body = CHAT | {"lora": {"adapters": [{"name": "sql"}]}}
    shown = (await client.post("/v1/chat/completions", json=body)).json()["lora"]
    for name in (*shown, *shown["adapters"][0]):
        assert re.search(rf"\b{name}\b", RESPONSE_LORA), name


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 2.5}, "number >= 0 < 2.5"),
        ({"type": "integer", "minimum": -(2**63), "exclusiveMaximum": 2**63}, "integer"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text"),
        ({"enum": ["a", "b"]}, '"a" | "b"'),
        ({"const": -1}, "-1"),
        ({"type": "string", "minLength": 1}, "text, not empty"),
        ({"type": "string", "minLength": 2, "maxLength": 5}, "text, 2 to 5 characters"),
        ({"type": "array", "items": {"type": "integer"}, "maxItems": 9}, "list of integers, at most 9"),
        ({"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}, "list of lists of integers"),
        ({"type": "object", "additionalProperties": {"type": "boolean"}}, "object of booleans"),
        ({}, "any"),
    ],
    ids=json.dumps,
)
def test_schemas_in_words(schema: dict[str, Any], text: str) -> None:
    assert values(schema) == text


def test_fields_of_objects_have_dotted_names() -> None:
    inner = {"type": "object", "required": ["b"], "properties": {"b": {"type": "string", "description": "why"}}}
    schema = {"anyOf": [{"type": "array", "items": {"anyOf": [{"type": "string"}, inner]}}, {"type": "null"}]}
    assert [(name, required) for name, _, required in rows("a", schema, False)] == [("a", False), ("a[].b", True)]
    assert described(inner["properties"]["b"]) == "why"
    assert described({"anyOf": [{"type": "string", "description": "inside"}, {"type": "null"}]}) == "inside"
