"""The constraint that makes an answer calls and nothing else."""

import json
from collections.abc import Mapping
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
_COMBINING = frozenset({"allOf", "not", "if", "dependentSchemas", "unevaluatedProperties", "$dynamicRef"})
"""Keywords by which one schema speaks of the properties of another."""


def forced_calls(use: ToolUse, form: ToolForm) -> Constraint:
    """One call of one of the tools that may be called, or several where both the request and the form have several.

    For llguidance, whose grammars take a JSON schema as a rule. The text begins behind `form.beginning`.
    """
    schema = json.dumps(_call_schema(use.callable, form.key))
    more = "" if form.has_one_call or not use.is_parallel else f"(next call){{0,{MOST_CALLS - 1}}}"
    rules = [f"start: call {more}", f"call: %json {schema}"]
    rules += [f"next: {json.dumps(form.between)}"] if more else []
    return Constraint(ConstraintKind.GRAMMAR, "\n".join(rules))


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
        definitions[tool.name] = _moved(tool.parameters, f"#/$defs/{tool.name}", closes)
    return {"x-guidance": _SPACING, "$defs": definitions, "anyOf": calls}


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
