"""A JSON schema in a few words, as a cell of a table has room for."""

from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]

BOUNDS = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
LONG = 1e15
"""Bounds from here on are those of a type, and mean nothing to a reader."""


def values(schema: Schema) -> str:
    """What the value may be: `number >= 0 <= 2`, `"float" | "base64"`, `list of integers`, ..."""
    if options := alternatives(schema):
        return " | ".join(dict.fromkeys(values(option) for option in options))
    if "const" in schema:
        return _literal(schema["const"])
    if "enum" in schema:
        return " | ".join(map(_literal, schema["enum"]))
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_plural(values(schema.get('items', {})))}{_counted(schema, 'Items')}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        of = f" of {_plural(values(inner))}" if isinstance(inner, dict) and inner else ""
        return f"object{of}{_counted(schema, 'Properties')}"
    if kind == "string":
        return f"text{_counted(schema, 'Length')}"
    bounds = [f" {sign} {_number(schema[key])}" for key, sign in BOUNDS if abs(schema.get(key, LONG)) < LONG]
    return f"{kind}{''.join(bounds)}"


def rows(name: str, schema: Schema, required: bool) -> Iterator[tuple[str, Schema, bool]]:
    """(dotted name, schema, whether it is required) of a field and of all that its objects and lists hold."""
    yield name, schema, required
    for option in alternatives(schema) or [schema]:
        is_list = option.get("type") == "array"
        for inner in alternatives(option.get("items", {})) or [option.get("items", {})] if is_list else [option]:
            needed = inner.get("required", ())
            for field, below in inner.get("properties", {}).items():
                yield from rows(f"{name}{'[]' if is_list else ''}.{field}", below, field in needed)


def alternatives(schema: Schema) -> list[Schema]:
    """The forms of a value that has several, null left out: it is the same as absent everywhere."""
    options = [option for option in schema.get("anyOf", ()) if option.get("type") != "null"]
    return [inner for option in options for inner in alternatives(option) or [option]]


def described(schema: Schema) -> str:
    """The field's own description; that of an optional field may stand with its only form."""
    own = schema.get("description")
    options = alternatives(schema)
    if own is None and len(options) == 1:
        own = options[0].get("description")
    return " ".join(str(own or "").split())


def _counted(schema: Schema, what: str) -> str:
    low, high = schema.get(f"min{what}"), schema.get(f"max{what}")
    unit = " characters" if what == "Length" else ""
    if high is not None:
        return f", {f'{low} to' if low else 'at most'} {high}{unit}"
    return ", not empty" if low == 1 else f", at least {low}{unit}" if low else ""


def _plural(text: str) -> str:
    """`integers` of `integer`, where that is one word."""
    first, _, rest = text.partition(" ")
    plain = first.rstrip(",")
    if plain not in ("integer", "number", "object", "boolean", "text", "list") or "|" in rest:
        return text
    return f"{plain}s{first[len(plain) :]}{f' {rest}' if rest else ''}"


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e6 or value != int(value) else str(int(value))
