"""What a parser makes of a text, put together again."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from server.tools.call_parser import CallBegins, CallParser, Text
from server.tools.form import ToolForm

NAMES = ("weather", "add-up", "now")


@dataclass(frozen=True)
class Spoken:
    content: str
    calls: tuple[tuple[str, str], ...] = ()


def read(form: ToolForm, pieces: Iterable[str], most: int | None = None, names: Sequence[str] = NAMES) -> Spoken:
    """The text and the calls (name, arguments) that come out; calls must come in order, and begin with their name."""
    parser = CallParser(form, names, most)
    said = [each for piece in pieces for each in parser.feed(piece)] + parser.end()
    content, calls = "", list[list[str]]()
    for each in said:
        if isinstance(each, Text):
            assert each.text
            content += each.text
        elif isinstance(each, CallBegins):
            assert each.index == len(calls)
            calls.append([each.name, ""])
        else:
            assert each.index == len(calls) - 1
            assert each.text
            calls[each.index][1] += each.text
    assert parser.num_calls == len(calls)
    return Spoken(content, tuple((name, arguments) for name, arguments in calls))


def cut(text: str, places: Iterable[int]) -> list[str]:
    """The text in pieces, cut at these places."""
    bounds = [0, *sorted({place % (len(text) + 1) for place in places}), len(text)]
    return [text[start:stop] for start, stop in pairwise(bounds)]
