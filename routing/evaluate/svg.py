"""Three kinds of plot as SVG text: lines over labelled positions, curves over numbers, and a matrix of shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8d5a97", "#c77800", "#4a4a4a")
_DASHES = ("", "6 3", "2 3")


def line_chart(title: str, positions: Sequence[str], lines: Mapping[str, Sequence[float]]) -> str:
    """Percent over evenly spaced positions; values are shares in [0, 1], the axis begins below the smallest."""
    left, top, width, height = 50, 40, 460, 260
    low = min(0.9, int(min(min(values) for values in lines.values()) * 10) / 10)
    found = [_text(left, 22, title, size=14)]

    def point(index: int, value: float) -> tuple[float, float]:
        across = left + width * index / max(1, len(positions) - 1)
        return round(across, 1), round(top + height * (1 - (value - low) / (1 - low)), 1)

    for step in range(round(low * 10), 11):
        y = point(0, step / 10)[1]
        found += [f'<path d="M{left} {y}h{width}" stroke="#ddd"/>', _text(left - 8, y + 4, f"{step * 10}", "end")]
    for index, label in enumerate(positions):
        found.append(_text(point(index, low)[0], top + height + 20, label, "middle"))
    for number, (name, values) in enumerate(lines.items()):
        points = [point(index, value) for index, value in enumerate(values)]
        found += _line(name, number, points, left + width + 20, top + 12 + 20 * number)
    return _page(left + width + 340, top + max(height, 20 * len(lines)) + 40, found)


def curve_chart(title: str, places: Sequence[float], curves: Mapping[str, Sequence[float]]) -> str:
    """Values at `places`, ascending; both axes have lines at whole numbers, and go as far as there are values."""
    left, top, width, height = 50, 40, 460, 300
    low = math.floor(min(map(min, curves.values())))
    high = max(low + 1, math.ceil(max(map(max, curves.values()))))
    found = [_text(left, 22, title, size=14)]

    def point(place: float, value: float) -> tuple[float, float]:
        across = left + width * (place - places[0]) / (places[-1] - places[0])
        return round(across, 1), round(top + height * (high - value) / (high - low), 1)

    for step in range(low, high + 1, -(-(high - low) // 12)):
        y = point(places[0], step)[1]
        found += [f'<path d="M{left} {y}h{width}" stroke="#ddd"/>', _text(left - 8, y + 4, f"{step}", "end")]
    for step in range(math.ceil(places[0]), math.floor(places[-1]) + 1):
        found.append(_text(point(step, low)[0], top + height + 20, f"{step}", "middle"))
    for number, (name, values) in enumerate(curves.items()):
        points = [point(*pair) for pair in zip(places, values, strict=True)]
        found += _line(name, number, points, left + width + 20, top + 12 + 20 * number)
    return _page(left + width + 340, top + max(height, 20 * len(curves)) + 40, found)


def heat_map(title: str, names: Sequence[str], shares: Sequence[Sequence[float]]) -> str:
    """Rows and columns have the same names; every cell shows its percentage, none below one half."""
    cell, left, top = 40, 110, 130
    found = [_text(10, 22, title, size=14)]
    for row, name in enumerate(names):
        x, y = left + cell * row + cell / 2, top + cell * row + cell / 2
        turned = f'transform="rotate(-50 {x} {top - 8})"'
        found += [_text(left - 8, y + 4, name, "end"), _text(x, top - 8, name, extra=turned)]
        for column, share in enumerate(shares[row]):
            fill = f'fill="#1b6ca8" fill-opacity="{share:.3f}" stroke="#eee"'
            x = left + cell * column
            found.append(f'<rect x="{x}" y="{y - cell / 2}" width="{cell}" height="{cell}" {fill}/>')
            if share >= 0.005:
                ink = 'fill="#fff"' if share > 0.6 else ""
                found.append(_text(x + cell / 2, y + 4, f"{share * 100:.0f}", "middle", extra=ink))
    return _page(left + cell * len(names) + 60, top + cell * len(names) + 20, found)


def _line(name: str, number: int, points: Sequence[tuple[float, float]], x: float, y: float) -> list[str]:
    """Line `number` with its entry in the key at (x, y)."""
    colour, dash = COLOURS[number % len(COLOURS)], _DASHES[number // len(COLOURS) % len(_DASHES)]
    path = "L".join(f"{across} {down}" for across, down in points)
    stroke = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
    key = f'<path d="M{x} {y}h24" {stroke}/>'
    return [f'<path d="M{path}" {stroke}/>', key, _text(x + 30, y + 4, name)]


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 11, extra: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" {extra}>{escape(text)}</text>'


def _page(width: float, height: float, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>\n"])
