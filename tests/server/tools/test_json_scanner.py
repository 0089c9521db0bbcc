"""The scanner against Python's own parser."""

import json

from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.tools.json_scanner import JsonScanner, Progress

FRAGMENTS = [
    *'{}[]:,"\\/ \n\t-+.eEu0123456789abtrfnl',
    '"a"',
    '"a": ',
    "true",
    "false",
    "null",
    "-0.5e+3",
    "\\u12aB",
    "\x01",
]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=10,
)


def scan(text: str) -> tuple[int, Progress]:
    """How many characters were fed before it was decided."""
    scanner, progress = JsonScanner(), Progress.OPEN
    for count, character in enumerate(text):
        if progress is not Progress.OPEN:
            return count, progress
        progress = scanner.feed(character)
    return len(text), progress


def refuse(name: str) -> None:
    raise ValueError(name)


decoder = json.JSONDecoder(strict=False, parse_constant=refuse)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from("{["), texts)
@example("[", "01]")
@example("[", "-]")
@example("[", "1.]")
@example("[", "1e]")
@example("[", "1,]")
@example("{", '"a":1,}')
@example("{", '"\\u12G4":1}')
@example("[", "NaN]")
@example("[", '"\x01"]')
@example("{", "]")
def test_it_is_done_where_python_is(bracket: str, rest: str) -> None:
    text = bracket + rest
    count, progress = scan(text)
    try:
        _, end = decoder.raw_decode(text)
    except ValueError:
        assert progress is not Progress.DONE
    else:
        assert (count, progress) == (end, Progress.DONE)


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.lists(values), st.dictionaries(st.text(), values)), st.sampled_from([None, 1]))
def test_all_beginnings_of_json_are_open(value: object, indent: int | None) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    scanner = JsonScanner()
    progress = [scanner.feed(character) for character in text]
    assert progress == [Progress.OPEN] * (len(text) - 1) + [Progress.DONE]
