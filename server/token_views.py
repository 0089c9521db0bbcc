"""An answer on a terminal, each token in the colour of the adapter that a token-level router gave most weight."""

from collections.abc import Mapping
from typing import Any

from server.admin_tables import Column, Printer

COLOURS = ("green", "yellow", "blue", "magenta", "cyan", "red", "bright_green", "bright_yellow", "bright_blue")
BASE = "dim"
ADAPTERS = (Column("adapter"), Column("share", right=True), Column("tokens", right=True))
NAMED_WITHOUT_COLOUR = "[{}]"


def print_tokens(out: Printer, lora: Mapping[str, Any]) -> None:
    """`lora` is an answer's object with `tokens`. Without colours every change of adapter is named instead."""
    (tokens, *_) = lora["tokens"]
    leading = [token["adapter"] for token in tokens]
    order = sorted(lora["adapters"], key=lambda entry: -entry.get("share", 0.0))
    colours = {entry["name"]: COLOURS[place % len(COLOURS)] for place, entry in enumerate(order)}
    spans: list[tuple[str, str]] = []
    before: object = ""
    for token in tokens:
        if not out.has_colours and token["adapter"] != before:
            spans.append((NAMED_WITHOUT_COLOUR.format(token["adapter"] or "base"), ""))
            before = token["adapter"]
        spans.append((token["text"], colours.get(token["adapter"], BASE)))
    out.spans(spans)
    out.line("")
    rows = [(entry["name"], f"{entry.get('share', 0.0):.1%}", leading.count(entry["name"])) for entry in order]
    out.table(ADAPTERS, rows, styles=[colours[entry["name"]] for entry in order])
    if None in leading:
        out.line(f"{leading.count(None)} tokens mostly by the base model", style=BASE)
