"""Schemas that only a document without end satisfies are told from others."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.schema_end import can_end

NODE = {"$ref": "#/$defs/node"}


def node(**schema: Any) -> dict[str, Any]:
    return {"$defs": {"node": schema}, **NODE}


ENDLESS = [
    {"$ref": "#"},
    node(**NODE),
    node(type="object", properties={"next": NODE}, required=["next"]),
    node(
        type="object",
        properties={"a": {"type": "object", "properties": {"b": NODE}, "required": ["b"]}},
        required=["a"],
    ),
    node(type="array", items=NODE, minItems=1),
    node(type="array", prefixItems=[{"type": "null"}, NODE], minItems=2),
    node(type=["array", "object"], items=NODE, minItems=2, properties={"x": NODE}, required=["x"]),
    node(anyOf=[NODE, {"type": "array", "items": NODE, "minItems": 1}]),
    node(allOf=[{"type": "object"}, {"type": "object", "properties": {"n": NODE}, "required": ["n"]}]),
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"type": "object", "properties": {"a/b%~": {"$ref": "#/properties/a~1b%25~0"}}, "required": ["a/b%~"]},
]
ENDING = [
    {},
    {"type": "object"},
    node(type="object", properties={"next": NODE}),
    node(type=["object", "null"], properties={"next": NODE}, required=["next"]),
    node(type="object", properties={"next": {"anyOf": [NODE, {"type": "null"}]}}, required=["next"]),
    node(type="array", items=NODE),
    node(type="array", prefixItems=[{"type": "null"}, NODE], minItems=1),
    node(oneOf=[NODE, {"const": 1}]),
    node(properties={"next": NODE}, required=["next"]),
    node(type="object", required=["other"], properties={"next": NODE}),
    node(type="object", properties={"next": NODE}, required=["next"], enum=[{"next": 1}]),
    {"$ref": "#/nowhere"},
    {"$ref": "https://example.com/schema"},
    {
        "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/b"}, "minItems": 1}, "b": {"type": "null"}},
        "$ref": "#/$defs/a",
    },
]


@pytest.mark.parametrize("schema", ENDLESS, ids=str)
def test_endless(schema: object) -> None:
    assert not can_end(schema)


@pytest.mark.parametrize("schema", ENDING, ids=str)
def test_ending(schema: object) -> None:
    assert can_end(schema)


def test_a_long_chain_of_references() -> None:
    chain: dict[str, Any] = {
        str(i): {"type": "array", "items": {"$ref": f"#/$defs/{i + 1}"}, "minItems": 1} for i in range(500)
    }
    assert not can_end({"$defs": chain | {"500": {"$ref": "#/$defs/0"}}, "$ref": "#/$defs/0"})
    assert can_end({"$defs": chain | {"500": {"type": "null"}}, "$ref": "#/$defs/0"})


WORDS = [
    "$ref",
    "type",
    "anyOf",
    "allOf",
    "properties",
    "required",
    "items",
    "minItems",
    "prefixItems",
    "$defs",
    "enum",
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.sampled_from(["#", "#/a", "object", "array", "null", *WORDS]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_anything_has_an_answer(value: object) -> None:
    assert can_end(value) in (True, False)
