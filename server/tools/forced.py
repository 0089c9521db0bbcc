"""The constraints of answers that have to be calls, or may be."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from server.engine.constraint import Constraint, ConstraintKind
from server.tools.definition import Tool, ToolUse
from server.tools.form import ToolForm

MOST_CALLS = 8
"""In a forced answer that may have several: small models do not find an end by themselves."""
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As models are shown JSON. Where space is free, small ones write it until their tokens are used up."""
_SCHEMAS = frozenset(
    {
        *("items", "additionalItems", "additionalProperties", "propertyNames", "contains", "not", "if", "then", "else"),
        *("unevaluatedItems", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "prefixItems"),
    }
)
"""Keywords whose value is a schema, or a list of some."""
_SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_WORDS = frozenset({"$id", "$schema", "$comment", "title", "description", "default", "examples"})
"""Keywords that allow and forbid nothing. `$id` would give references another root."""
_NOT_KEPT = frozenset(
    {
        *("uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems", "unevaluatedProperties"),
        *("not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies", "propertyNames"),
        *("minProperties", "maxProperties"),
    }
)
"""Keywords that llguidance refuses, always or mostly."""
_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
_COMBINING = frozenset({"allOf", "not", "if", "dependentSchemas", "unevaluatedProperties", "$dynamicRef"})
"""Keywords by which one schema speaks of the properties of another."""


def forced_calls(use: ToolUse, form: ToolForm, tokens: Mapping[str, int]) -> Constraint:
    """One call of one of the tools that may be called, or several where both the request and the form have several.

    For llguidance, whose grammars take a JSON schema as a rule. The text begins behind `form.beginning`. `tokens` are
    the ids of those markers that are special tokens: no text is one, so a grammar names them by their id.
    """
    rules = _rules(use, form, tokens)
    return Constraint(ConstraintKind.GRAMMAR, "\n".join(["start: calls", *rules]), param="tools")


def answer_or_calls(answer: Constraint, use: ToolUse, form: ToolForm, tokens: Mapping[str, int]) -> Constraint:
    """What the answer must be, or calls in its place. Only JSON can be told from calls; other answers stay alone."""
    if answer.kind not in (ConstraintKind.JSON_OBJECT, ConstraintKind.JSON_SCHEMA):
        return answer
    try:
        schema = json.loads(answer.source) if answer.kind is ConstraintKind.JSON_SCHEMA else {"type": "object"}
        answered = f"answer: %json {json.dumps({**schema, 'x-guidance': _SPACING})}"
    except (ValueError, TypeError, RecursionError):  # no JSON, or no object; the engine says what it thinks of it
        return answer
    start = f"start: answer | {_literal(form.beginning, tokens)} calls {_literal(form.end, tokens)}"
    return replace(answer, kind=ConstraintKind.GRAMMAR, source="\n".join([start, answered, *_rules(use, form, tokens)]))


def _rules(use: ToolUse, form: ToolForm, tokens: Mapping[str, int]) -> list[str]:
    call = f"call: %json {json.dumps(_call_schema(use.callable, form.key))}"
    if form.has_one_call or not use.is_parallel:
        return ["calls: call", call]
    return [f"calls: call (next call){{0,{MOST_CALLS - 1}}}", call, f"next: {_literal(form.between, tokens)}"]


def _literal(text: str, tokens: Mapping[str, int]) -> str:
    """The text in Lark's notation, its special tokens by their ids."""
    if not tokens:
        return json.dumps(text)
    parts = re.split(f"({'|'.join(map(re.escape, tokens))})", text)
    return " ".join(f"<[{tokens[part]}]>" if part in tokens else json.dumps(part) for part in parts if part)


def _call_schema(tools: tuple[Tool, ...], key: str) -> dict[str, Any]:
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, key: {"$ref": f"#/$defs/{tool.name}"}},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    definitions = {}
    for tool in tools:
        closes = not _COMBINING & _keywords(tool.parameters)
        schema = tool.parameters if tool.strict else _kept(tool.parameters)
        definitions[tool.name] = _moved(schema, f"#/$defs/{tool.name}", closes)
    return {"x-guidance": _SPACING, "$defs": definitions, "anyOf": calls}


def _kept(schema: object) -> Any:
    """The schema without what a grammar cannot keep: a call that may break a rule is better than none."""
    if isinstance(schema, list):
        return [_kept(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NOT_KEPT or (key == "format" and not (isinstance(value, str) and value in _FORMATS)):
            continue
        if key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
            kept[key] = {name: _kept(each) for name, each in value.items()}
        elif key == "oneOf" and "anyOf" not in schema:
            kept["anyOf"] = _kept(value)  # that no two of them fit is more than can be kept
        else:
            kept[key] = _kept(value) if key in _SCHEMAS else value
    return kept


def _moved(schema: object, root: str, closes: bool) -> Any:
    """The schema with its references relative to where it stands now, in `root`, and without what explains it.

    With `closes`, objects that name their properties and do not say whether they have others have no others: nobody
    asks for them, and a small model would invent one after the other.
    """
    if isinstance(schema, list):
        return [_moved(each, root, closes) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = root + value[1:]
        elif key in _SCHEMAS:
            moved[key] = _moved(value, root, closes)
        elif key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
            moved[key] = {name: _moved(each, root, closes) for name, each in value.items()}
        elif key not in _WORDS:
            moved[key] = value
    if closes and "properties" in moved and "additionalProperties" not in moved and "patternProperties" not in moved:
        moved["additionalProperties"] = False
    return moved


def _keywords(value: object) -> set[str]:
    """All keys anywhere in it."""
    if isinstance(value, list):
        return set().union(*map(_keywords, value))
    if not isinstance(value, Mapping):
        return set()
    return {*value, *set().union(*map(_keywords, value.values()))}
