"""What the administration's commands print: tables, sizes and times for people."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import zip_longest

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

DIGITS = 12
"""Of a digest, in tables."""
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_DATED = 60 * 86400
"""Seconds after which a date says more than an age."""
_BETWEEN = 3
"""Cells that a column takes beside its own, at most."""


@dataclass(frozen=True)
class Column:
    """One column. Where the terminal is narrow those of highest `spare` are left out first; 0 always stays."""

    title: str
    spare: int = 0
    right: bool = False
    style: str = ""


class Printer:
    """Prints on `console`. Nothing is ever shortened or broken, so that names can be copied and piped."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._room = console.width

    @property
    def has_colours(self) -> bool:
        return self._console.color_system is not None

    def line(self, text: str, style: str = "") -> None:
        self._console.print(Text(printable(text), style=style), soft_wrap=True)

    def spans(self, spans: Iterable[tuple[str, str]]) -> None:
        """One text, each part in its own style."""
        self._console.print(Text.assemble(*((printable(text), style) for text, style in spans)), soft_wrap=True)

    def table(
        self,
        columns: Sequence[Column],
        rows: Iterable[Sequence[object]],
        empty: str = "",
        styles: Sequence[str] = (),
    ) -> None:
        """One line a row, in its own style if there are `styles`; `empty` instead of a table without any."""
        cells = [[printable(str(cell)) for cell in row] for row in rows]
        if not cells:
            return self.line(empty)
        widths = [max(map(cell_len, [column.title, *values])) for column, *values in zip(columns, *cells, strict=True)]
        needed = sum(widths) + _BETWEEN * len(widths)
        shown = _fitting(columns, widths, self._room if self._console.is_terminal else needed)
        table = Table(box=box.SIMPLE_HEAD if self._console.is_terminal else None, pad_edge=False, header_style="bold")
        for index in shown:
            column = columns[index]
            table.add_column(
                Text(column.title), justify="right" if column.right else "left", no_wrap=True, style=column.style
            )
        for row, style in zip_longest(cells, styles):
            table.add_row(*(Text(row[index]) for index in shown), style=style)
        self._console.width = max(self._room, needed)  # else rich shortens what is too wide
        with self._console.capture() as captured:
            self._console.print(table)
        for text in captured.get().splitlines():
            self._console.file.write(text.rstrip() + "\n")
        return None

    def details(self, pairs: Iterable[tuple[str, object]]) -> None:
        """One line each, but those that are None or empty."""
        given = [(label, printable(str(value))) for label, value in pairs if value is not None and value != ""]
        width = max((len(label) for label, _ in given), default=0)
        for label, value in given:
            text = Text.assemble((f"{label:<{width}}  ", "dim"), value)
            self._console.print(text, soft_wrap=True)


def _fitting(columns: Sequence[Column], widths: Sequence[int], room: int) -> list[int]:
    """Indices of the columns that fit into `room` cells."""
    shown = list(range(len(columns)))
    for index in sorted(shown, key=lambda each: -columns[each].spare):
        if sum(widths[each] + _BETWEEN for each in shown) <= room or not columns[index].spare:
            break
        shown.remove(index)
    return shown


def printable(text: str) -> str:
    """`text` on one line and without control characters, which could steer the terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def size(count: object) -> str:
    """Bytes, as `19.5 MB`."""
    return decimal(int(count)) if isinstance(count, int | float) else "-"


def number(count: object) -> str:
    return f"{count:,}" if isinstance(count, int | float) else "-"


def quota(limit: object, unlimited: str = "-") -> str:
    if isinstance(limit, float):
        return f"{limit:,g}"
    return number(limit) if limit is not None else unlimited


def short(digest: str) -> str:
    return digest[:DIGITS]


def ago(then: object, now: float) -> str:
    """When a time in seconds since the epoch was, as `5 min ago`; a date after two months."""
    if not isinstance(then, int | float):
        return "never"
    return _age(now - then) if now - then < _DATED else f"{datetime.fromtimestamp(then, UTC):%Y-%m-%d}"


def moment(then: object, now: float) -> str:
    """The time itself, in UTC, and how long ago that was."""
    if not isinstance(then, int | float):
        return "never"
    return f"{datetime.fromtimestamp(then, UTC):%Y-%m-%d %H:%M:%S} UTC ({_age(now - then)})"


def _age(seconds: float) -> str:
    unit, name = next((each for each in _UNITS if seconds >= each[0]), _UNITS[-1])
    return f"{max(0, int(seconds // unit))} {name} ago"
