"""Rows and cells of Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def table_head(cells: Sequence[str]) -> list[str]:
    """The two lines that a table begins with."""
    return [table_row(cells), "|" + "---|" * len(cells)]


def table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def percent(share: float | None) -> str:
    """Of a share in [0, 1]; empty where there is none."""
    return "" if share is None else f"{100 * share:.1f}"


def percent_range(interval: Sequence[float], sign: str = "") -> str:
    """Of two shares; `sign` "+" shows that of positive ones, too."""
    low, high = (f"{100 * share:{sign}.1f}" for share in interval)
    return f"{low} to {high}"
