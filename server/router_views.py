"""How routers, and what they choose, look on a terminal. `now` is seconds since the epoch."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from server.admin_tables import Column, Printer, ago, moment, number

Json = Mapping[str, Any]

ROUTERS = (
    Column("router", style="cyan"),
    Column("kind", spare=3),
    Column("adapters", right=True),
    Column("min score", spare=1, right=True),
    Column("state"),
    Column("encoder", spare=2),
    Column("created", spare=4),
)
CANDIDATES = (
    Column("rank", right=True),
    Column("adapter", style="cyan"),
    Column("score", right=True),
    Column("weight", right=True),
)
REASONS = {
    "below_min_score": "no adapter is similar enough to the prompt",
    "no_candidates": "there is no adapter to choose from",
    "empty_text": "the prompt is empty",
    "no_adapter": "the router chose no adapter",
}
LAYERS = (Column("layer", right=True), Column("chosen", style="cyan"), Column("probabilities"))
USED = (Column("adapter", style="cyan"), Column("weight", right=True), Column("share", right=True))


def print_routers(out: Printer, rows: Sequence[Json], now: float) -> None:
    out.table(ROUTERS, [_router_cells(row, now) for row in rows], empty="no routers")


def _router_cells(row: Json, now: float) -> tuple[object, ...]:
    return (
        row["name"],
        _kind(row),
        number(row["adapters"]),
        _score(row["min_score"]),
        "STALE" if row["stale"] else "serving",
        row["encoder"] or "-",
        _created(row, ago(row["created"], now)),
    )


def print_router(out: Printer, row: Json, now: float) -> None:
    """One router, and of a trained one how that was."""
    out.details(
        [
            ("router", row["name"]),
            ("kind", _kind(row)),
            ("state", f"STALE: {row['problem']}" if row["stale"] else "serving"),
            ("adapters", f"{number(row['adapters'])} can be chosen"),
            ("min score", None if row["members"] else _score(row["min_score"])),
            ("encoder", row["encoder"]),
            *((f"adapter {member['name']}", member["state"]) for member in row["members"] or ()),
            ("created", _created(row, moment(row["created"], now))),
            *((f"training {name}", _plain(value)) for name, value in sorted((row["training"] or {}).items())),
        ]
    )


def print_route(out: Printer, answer: Json, most: int) -> None:
    """The decision and, best first, its `most` best candidates; the chosen ones have weights."""
    weights = {entry["name"]: entry["weight"] for entry in answer["adapters"]}
    if not weights:
        reason = REASONS.get(answer.get("outcome", ""), "nothing was chosen")
        out.line(f"the base model answers: {reason}", style="yellow")
    elif answer.get("outcome") == "undecided":
        out.line(f"decided when the prompt is computed, among {', '.join(weights)}", style="yellow")
    scores = answer.get("scores", [])
    cells = []
    for rank, entry in enumerate(scores[:most], 1):
        weight = weights.get(entry["name"])
        cells.append((rank, entry["name"], _score(entry["score"]), "" if weight is None else f"{weight:.3g}"))
    if cells:
        out.table(CANDIDATES, cells)
    if len(scores) > most:
        out.line(f"and {number(len(scores) - most)} more, shown by --limit {len(scores)}")
    cached = ", remembered" if answer["cached"] else ""
    out.line(f"{answer['router']}, {answer['composition']}, {answer['route_ms']:.1f} ms{cached}", style="dim")


def print_layers(out: Printer, lora: Json) -> None:
    """An answer's object with `layers`: who was chosen for the prompt, in all and layer by layer."""
    if lora["adapters"]:
        rows = [(each["name"], f"{each['weight']:.3g}", f"{each['share']:.1%}") for each in lora["adapters"]]
        out.table(USED, rows)
    else:
        out.line(f"the base model answers: {REASONS['no_adapter']}", style="yellow")
    out.table(LAYERS, [(number, *_layer_cells(layer)) for number, layer in enumerate(lora["layers"])])
    cached = ", remembered" if lora["cached"] else ""
    out.line(f"{lora['router']}, {lora['route_ms']:.1f} ms{cached}", style="dim")


def _layer_cells(layer: Json) -> tuple[str, str]:
    ranked = sorted(layer.get("probabilities", ()), key=lambda each: -each["probability"])
    shown = "  ".join(f"{each['name'] or 'none'} {each['probability']:.2f}" for each in ranked)
    return " ".join(name or "none" for name in layer["chosen"]), shown


def _kind(row: Json) -> str:
    return row["kind"] if row["mode"] is None else f"{row['kind']}, trained {row['mode']}"


def _created(row: Json, when: str) -> str:
    return "built in" if row["created"] is None and not row["stale"] else when


def _score(score: object) -> str:
    return f"{score:.3f}" if isinstance(score, int | float) else "-"


def _plain(value: object) -> str:
    """What is said in a line of it; what lies deeper, such as figures by task or by layer, is in `--json`."""
    if isinstance(value, dict):
        flat = ((name, each) for name, each in value.items() if not isinstance(each, dict | list))
        return ", ".join(f"{name} {_plain(each)}" for name, each in flat)
    if isinstance(value, list):
        return ", ".join(_plain(each) for each in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
