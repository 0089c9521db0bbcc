"""Lines over numbers as SVG text."""

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8d5a97", "#c77800", "#4a4a4a")
LEFT, TOP, WIDTH, HEIGHT = 64, 36, 420, 220
MOST_POINTS = 400

Points = Sequence[tuple[float, float]]


def cumulative(values: Sequence[float]) -> list[tuple[float, float]]:
    """The share of values up to each of them, thinned to what a plot can show."""
    ordered = sorted(values)
    step = max(1, len(ordered) // MOST_POINTS)
    kept = [*range(0, len(ordered), step), len(ordered) - 1] if ordered else []
    return [(ordered[place], (place + 1) / len(ordered)) for place in kept]


def plot(title: str, across: str, lines: Mapping[str, Points], log: bool = False) -> str:
    """One line for each name, y from 0 up; x on a logarithmic axis if `log`, where points up to 0 are left out."""
    drawn = {name: [(x, y) for x, y in points if not log or x > 0] for name, points in lines.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    scale = log10 if log else float
    xs = [scale(x) for points in drawn.values() for x, _ in points]
    low, high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    top = max(y for points in drawn.values() for _, y in points) or 1.0

    def place(x: float, y: float) -> str:
        return f"{LEFT + WIDTH * (scale(x) - low) / (high - low):.1f} {TOP + HEIGHT * (1 - y / top):.1f}"

    parts = [_text(LEFT, 20, title, size=14)]
    for tick in _ticks(0.0, top):
        y = TOP + HEIGHT * (1 - tick / top)
        parts.append(f'<path d="M{LEFT} {y:.1f}h{WIDTH}" stroke="currentColor" opacity=".15"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{tick:g}", "end"))
    for tick in range(ceil(low), floor(high) + 1) if log else _ticks(low, high):
        x = LEFT + WIDTH * (tick - low) / (high - low)
        parts.append(_text(x, TOP + HEIGHT + 16, f"{10**tick:g}" if log else f"{tick:g}", "middle"))
    parts.append(_text(LEFT + WIDTH / 2, TOP + HEIGHT + 34, across, "middle"))
    for number, (name, points) in enumerate(drawn.items()):
        colour, y = COLOURS[number % len(COLOURS)], TOP + 12 + 18 * number
        path = "L".join(place(x, value) for x, value in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<path d="M{LEFT + WIDTH + 12} {y}h20" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(LEFT + WIDTH + 38, y + 4, name))
    size = f"0 0 {LEFT + WIDTH + 160} {TOP + HEIGHT + 44}"
    return f'<svg viewBox="{size}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers in [low, high]."""
    rough = (high - low) / 5
    unit = 10 ** floor(log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [step * number for number in range(ceil(low / step), floor(high / step) + 1)]


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 11) -> str:
    style = f'text-anchor="{anchor}" font-size="{size}" fill="currentColor"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
