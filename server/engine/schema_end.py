"""Whether a JSON schema that refers to itself lets a document end.

The grammar library refuses schemas that nothing satisfies, but not those that only a document without end satisfies: a
list item that must have such an item itself, and so on. An answer to one is cut off wherever it stops.
"""

from typing import Any
from urllib.parse import unquote

SCALARS = frozenset({"string", "number", "integer", "boolean", "null"})


def can_end(schema: object) -> bool:
    """Whether some finite document has all that must be there. Whatever else is wrong with it is not looked at.

    The least fixed point over what is referred to: at first nothing is known to end, then what needs nothing else, then
    what needs only that. The schema must not be nested deeper than the library allows, 128 levels.
    """
    waiting = {pointer: _target(schema, pointer) for pointer in _pointers(schema)}
    known: set[str] = set()
    while ended := {pointer for pointer, target in waiting.items() if _ends(target, known)}:
        known |= ended
        waiting = {pointer: target for pointer, target in waiting.items() if pointer not in ended}
    return _ends(schema, known)


def _ends(schema: object, known: set[str]) -> bool:
    """Whether a document of this schema can end if those of the `known` references do."""
    if not isinstance(schema, dict):
        return schema is not False
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#") and reference not in known:
        return False
    for word, enough in (("anyOf", any), ("oneOf", any), ("allOf", all)):
        options = schema.get(word)
        if isinstance(options, list) and options and not enough(_ends(option, known) for option in options):
            return False
    return "const" in schema or "enum" in schema or _a_type_ends(schema, known)


def _a_type_ends(schema: dict[str, Any], known: set[str]) -> bool:
    types = schema.get("type")
    names = types if isinstance(types, list) else [types]
    if not all(isinstance(name, str) for name in names):
        return True
    allowed = set(names)
    if allowed & SCALARS:
        return True
    return ("object" in allowed and _object_ends(schema, known)) or ("array" in allowed and _array_ends(schema, known))


def _object_ends(schema: dict[str, Any], known: set[str]) -> bool:
    required, properties = schema.get("required"), schema.get("properties")
    if not isinstance(required, list) or not isinstance(properties, dict):
        return True
    return all(_ends(properties.get(name, True), known) for name in required if isinstance(name, str))


def _array_ends(schema: dict[str, Any], known: set[str]) -> bool:
    least, first = schema.get("minItems", 0), schema.get("prefixItems", [])
    if not isinstance(least, int) or not isinstance(first, list):
        return True
    needed = first[:least] + ([schema.get("items", True)] if least > len(first) else [])
    return all(_ends(item, known) for item in needed)


def _pointers(schema: object) -> set[str]:
    """All references into the schema itself."""
    found, level = set(), [schema]
    while level:
        for each in level:
            reference = each.get("$ref") if isinstance(each, dict) else None
            if isinstance(reference, str) and reference.startswith("#"):
                found.add(reference)
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [item for items in inner for item in items]
    return found


def _target(schema: object, pointer: str) -> object:
    """What a reference means (RFC 6901); anything at all where it means nothing."""
    for part in pointer.removeprefix("#").split("/")[1:]:
        key = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(schema, dict):
            schema = schema.get(key, True)
        elif isinstance(schema, list) and key.isdecimal() and int(key) < len(schema):
            schema = schema[int(key)]
        else:
            return True
    return schema
