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
_ALTERNATIVES = frozenset({"allOf", "anyOf", "oneOf", "not", "if", "$ref", "$dynamicRef", "dependentSchemas"})
_OPEN = frozenset({"additionalProperties", "unevaluatedProperties", "patternProperties"})
_DATA = frozenset({"const", "enum", "default", "examples"})


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
    definitions = {tool.name: _moved(tool.parameters, f"#/$defs/{tool.name}") for tool in tools}
    return {"x-guidance": _SPACING, "$defs": definitions, "anyOf": calls}


def _moved(schema: object, root: str, *, closes: bool = True) -> Any:
    """The schema with its references relative to where it stands now, in `root`.

    Objects that name their properties, and do not say whether they have others, have no others: nobody asks for them,
    and a small model would invent one after the other. Parts of an `allOf` may speak of each other's properties.
    """
    if isinstance(schema, list):
        return [_moved(each, root, closes=closes) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = root + value[1:]
        elif key in _DATA:
            moved[key] = value
        elif key not in ("$id", "$schema"):
            moved[key] = _moved(value, root, closes=closes and key != "allOf")
    if closes and isinstance(schema.get("properties"), Mapping) and not (schema.keys() & (_ALTERNATIVES | _OPEN)):
        moved["additionalProperties"] = False
    return moved
