"""Tables and numbers for people: whole names on any terminal, nothing but text in a pipe."""

import io

import pytest
from rich.console import Console

from server.admin_tables import Column, Printer, ago, moment, number, printable, quota, size

COLUMNS = (Column("name", style="cyan"), Column("rank", right=True), Column("tags", spare=2), Column("age", spare=1))
NAME = "a-name-of-forty-eight-cells-that-must-stay-whole"
ROWS = [(NAME, 16, "[bold]x[/bold]", "5 s ago"), ("漢字", 4, "", "never")]
NOW = 1_700_000_000.0


def printed(width: int | None) -> str:
    """The table on a terminal of `width` cells, or in a pipe."""
    file = io.StringIO()
    terminal = width is not None
    console = Console(file=file, force_terminal=terminal, width=width or 20, no_color=not terminal, highlight=False)
    Printer(console).table(COLUMNS, ROWS)
    return file.getvalue()


def test_a_pipe_gets_plain_text() -> None:
    text = printed(None)
    assert "\x1b" not in text
    assert text.splitlines() == [
        f"{'name':<48}  rank  tags            age",
        f"{NAME}    16  [bold]x[/bold]  5 s ago",
        f"{'漢字':<46}     4                  never",
    ]


def test_columns_leave_a_narrow_terminal_in_order() -> None:
    assert all(title in printed(100) for title in ("name", "rank", "tags", "age"))
    assert "tags" not in printed(75)
    assert "age" in printed(75)
    assert "age" not in printed(60)


@pytest.mark.parametrize("width", [10, 40, 60, 75, 200])
def test_names_stay_whole(width: int) -> None:
    text = printed(width)
    assert NAME in text
    assert "…" not in text
    assert "\x1b[36m" in text
    assert all(not line.endswith(" ") for line in text.splitlines())


def test_details_and_lines() -> None:
    file = io.StringIO()
    out = Printer(Console(file=file, width=20, highlight=False))
    out.details([("name", NAME), ("digest", "ab" * 32), ("tags", ""), ("note", None), ("zero", 0)])
    out.line("[red]not markup[/red] " * 3)
    assert file.getvalue().splitlines() == [
        f"name    {NAME}",
        f"digest  {'ab' * 32}",
        "zero    0",
        "[red]not markup[/red] " * 3,
    ]


def test_an_empty_table_says_so() -> None:
    file = io.StringIO()
    Printer(Console(file=file)).table(COLUMNS, [], empty="no adapters")
    assert file.getvalue() == "no adapters\n"


def test_nothing_steers_the_terminal() -> None:
    assert printable("a\x1b[31mb\nc\x9bd\u202ee é漢") == "a\\x1b[31mb\\nc\\x9bd\\u202ee é漢"


def test_numbers() -> None:
    assert [size(0), size(999), size(19_533_112), size(None)] == ["0 bytes", "999 bytes", "19.5 MB", "-"]
    assert [number(1234567), number(None)] == ["1,234,567", "-"]
    assert [quota(0.5), quota(100_000), quota(50.0), quota(None), quota(None, "unlimited")] == [
        "0.5",
        "100,000",
        "50",
        "-",
        "unlimited",
    ]
    assert quota(12_345_678) == "12,345,678"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 s ago"),
        (0.4, "0 s ago"),
        (59.9, "59 s ago"),
        (60, "1 min ago"),
        (3599, "59 min ago"),
        (7200, "2 h ago"),
        (86400 * 59, "59 d ago"),
        (86400 * 60, "2023-09-15"),
    ],
)
def test_ages(seconds: float, text: str) -> None:
    assert ago(NOW - seconds, NOW) == text


def test_moments() -> None:
    assert ago(None, NOW) == moment(None, NOW) == "never"
    assert moment(NOW - 90, NOW) == "2023-11-14 22:11:50 UTC (1 min ago)"
    assert moment(NOW - 86400 * 100, NOW).endswith("(100 d ago)")
