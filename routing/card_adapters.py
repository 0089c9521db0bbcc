"""The adapters that a router was trained over, as its card names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from routing.card_file import CARD_FILE, RouterFolderError, expect, is_hex, is_text

MAX_ADAPTERS = 62
"""More than the papers embed; every decision pays for the logits of all rows."""


@dataclass(frozen=True, slots=True)
class CardAdapter:
    """The adapter that a row of a router stands for: its name in training, and the digest of its weights."""

    name: str
    digest: str


def adapter_fields(adapters: Sequence[CardAdapter]) -> list[dict[str, str]]:
    """As they stand in `router.json`."""
    return [{"name": adapter.name, "digest": adapter.digest} for adapter in adapters]


def parse_adapters(found: object, most: int = MAX_ADAPTERS) -> tuple[CardAdapter, ...]:
    """The card's field `adapters`. Raises RouterFolderError."""
    if not isinstance(found, list) or not 1 <= len(found) <= most:
        count = f"1 to {most} objects" if most > 1 else "one object"
        raise RouterFolderError(f"{CARD_FILE}: field adapters: expected a list of {count} of name and digest")
    for place, entry in enumerate(found):
        where = f"adapters[{place}]"
        expect(isinstance(entry, dict) and entry.keys() == {"name", "digest"}, where, "an object of name and digest")
        expect(is_text(entry["name"], 1, 128), f"{where}.name", "a text of 1 to 128 characters")
        expect(is_hex(entry["digest"], 64), f"{where}.digest", "64 lower-case hex digits")
    adapters = tuple(CardAdapter(entry["name"], entry["digest"]) for entry in found)
    expect(len({adapter.name for adapter in adapters}) == len(adapters), "adapters", "names that differ")
    return adapters


def parse_base(base: Any) -> tuple[str, str]:
    """Fingerprint and name of the card's field `base`. Raises RouterFolderError."""
    expect(isinstance(base, dict) and base.keys() == {"fingerprint", "name"}, "base", "an object of fingerprint, name")
    expect(is_hex(base["fingerprint"], 64), "base.fingerprint", "64 lower-case hex digits")
    expect(is_text(base["name"], 1, 200), "base.name", "a text of 1 to 200 characters")
    return base["fingerprint"], base["name"]


def check_base(wanted: str | None, fingerprint: str, name: str, what: str) -> None:
    """Raise RouterFolderError for another base model than that of `wanted`; `what` belongs to the card's."""
    if wanted is not None and fingerprint != wanted:
        raise RouterFolderError(
            f"{CARD_FILE}: field base.fingerprint: the {what} belong to another base model, {name} "
            f"({fingerprint[:16]}), expected {wanted[:16]}"
        )
