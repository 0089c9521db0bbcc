"""Bounds on structure, which text inside strings never reaches."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import json_structure
from server.json_structure import MOST_CONTAINERS, MOST_STRINGS, MOST_VALUES, TooComplex, check_structure

VALUES = st.recursive(
    st.none() | st.integers() | st.text('ab"\\{[,:', max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('"\\{,', max_size=3), inner, max_size=4),
    max_leaves=20,
)


def counts(value: Any) -> tuple[int, int, int]:
    """Containers, strings, commas between entries."""
    if isinstance(value, str):
        return 0, 1, 0
    if not isinstance(value, list | dict):
        return 0, 0, 0
    inner = list(value) + list(value.values()) if isinstance(value, dict) else value
    parts = [counts(each) for each in inner]
    sums = [sum(part[index] for part in parts) for index in range(3)]
    return sums[0] + 1, sums[1], sums[2] + max(0, len(value) - 1)


@given(VALUES, st.integers(1, 7))
def test_what_is_counted_is_what_a_parser_makes(value: Any, chunk: int) -> None:
    text = json.dumps(value).encode()
    containers, strings, entries = counts(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_structure, "CHUNK", chunk)
        for name, count in (("CONTAINERS", containers), ("STRINGS", strings), ("VALUES", entries)):
            for bound in ("CONTAINERS", "STRINGS", "VALUES"):
                patch.setattr(json_structure, f"MOST_{bound}", 10**9)
            patch.setattr(json_structure, f"MOST_{name}", count)
            check_structure(text)
            if count:
                patch.setattr(json_structure, f"MOST_{name}", count - 1)
                with pytest.raises(TooComplex):
                    check_structure(text)


@pytest.mark.parametrize(
    "text",
    [
        b"[" + b",".join([b"{}"] * MOST_CONTAINERS) + b"]",
        b"[" + b",".join([b"[]"] * MOST_CONTAINERS) + b"]",
        b"{" + b",".join([b'"a":1'] * (MOST_STRINGS + 1)) + b"}",
        b"[" + b",".join([b"1"] * (MOST_VALUES + 2)) + b"]",
        b'["", "' + b'\\"{[,' * 300_000 + b'",' + b",".join([b"[]"] * MOST_CONTAINERS),  # no JSON at all
    ],
    ids=["objects", "lists", "keys", "numbers", "torn"],
)
def test_more_than_any_request_needs(text: bytes) -> None:
    with pytest.raises(TooComplex, match="the body has more than"):
        check_structure(text)


@pytest.mark.parametrize("text", ['{"a": [1, 2]}', '{"a"\\', ",,,,[[[[{{{{"], ids=["code", "backslash", "marks"])
def test_long_texts_are_no_structure(text: str) -> None:
    """The same characters are too much structure where they do not stand in a string."""
    check_structure(json.dumps({"prompt": text * 300_000}).encode())
    with pytest.raises(TooComplex):
        check_structure((text * 300_000).replace("\\", "").encode())


def test_a_prompt_of_a_long_context() -> None:
    check_structure(json.dumps({"prompt": list(range(MOST_VALUES))}).encode())
    with pytest.raises(TooComplex, match="values"):
        check_structure(json.dumps({"prompt": list(range(MOST_VALUES + 2))}).encode())
