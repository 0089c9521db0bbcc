"""Stop strings, wherever the borders of the pieces lie."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from server.stops import StopStrings

small = st.text(alphabet="ab<", max_size=30)
stop_lists = st.lists(st.text(alphabet="ab<", min_size=1, max_size=5), min_size=1, max_size=4)


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By definition: the first character that completes a stop string ends the text; the longest one counts."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def split(text: str, cuts: list[int]) -> list[str]:
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:stop] for start, stop in pairwise(places)]


@given(text=small, stops=stop_lists, cuts=st.lists(st.integers(0, 30), max_size=10))
def test_any_split_gives_the_same(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopStrings(stops)
    out = "".join(matcher.feed(piece) for piece in split(text, cuts))
    out += "" if matcher.hit is not None else matcher.flush()
    assert (out, matcher.hit) == expected(text, stops)


@given(text=small, stops=stop_lists)
def test_nothing_that_may_become_a_stop_string_is_given_out(text: str, stops: list[str]) -> None:
    matcher, out = StopStrings(stops), ""
    for position, character in enumerate(text):
        out += matcher.feed(character)
        seen = text[: position + 1]
        assert seen.startswith(out)
        if matcher.hit is not None:
            return
        held = len(seen) - len(out)
        possible = [size for stop in stops for size in range(len(stop)) if seen.endswith(stop[:size])]
        assert held == max(possible)


def test_after_a_hit_nothing_comes() -> None:
    matcher = StopStrings(["STOP"])
    assert matcher.feed("one STOP two") == "one "
    assert matcher.feed("three") == ""
    assert matcher.hit == "STOP"


def test_without_stop_strings_text_passes() -> None:
    matcher = StopStrings([])
    assert matcher.feed("anything") == "anything"
    assert matcher.flush() == ""
