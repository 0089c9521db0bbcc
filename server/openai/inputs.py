"""Texts or token ids, one or many: what `prompt` and `input` may be."""

from typing import Any

from pydantic_core import PydanticCustomError

Inputs = tuple[str | tuple[int, ...], ...]

_IDS = {"type": "array", "items": {"type": "integer"}}
_TEXTS = {"type": "array", "items": {"type": "string"}}
INPUTS_SCHEMA = {"anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS}]}


def inputs_of(value: object, kind: str, most: int) -> Inputs:
    """All forms in one. `kind` is the field's name; raises PydanticCustomError, for more than `most` of them too."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        message = "expected a string, token ids, or a list of either, not empty"
        raise PydanticCustomError(f"{kind}_type", message)
    if _is_ids(value):
        return (tuple(value),)
    if len(value) > most:
        raise PydanticCustomError(f"{kind}_count", f"expected at most {{most}} {kind}s", {"most": most})
    if all(isinstance(entry, str) for entry in value):
        return tuple(value)
    if all(isinstance(entry, list) and entry and _is_ids(entry) for entry in value):
        return tuple(tuple(entry) for entry in value)
    message = f"expected all {kind}s to be strings, or all lists of token ids"
    raise PydanticCustomError(f"{kind}_type", message)


def _is_ids(value: list[Any]) -> bool:
    return set(map(type, value)) <= {int}  # true and false are no token ids
