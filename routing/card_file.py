"""`router.json`, the card of any kind of trained router, and what all kinds check of it and of their tensors' file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

CARD_FILE = "router.json"
CHANGE_FILE = "router.safetensors"
MAX_CARD_BYTES = 1 << 20
MAX_CHANGE_BYTES = 8 << 30
MAX_DEPTH = 20
"""Levels of objects and lists."""


class RouterFolderError(Exception):
    """A folder is not a trained router; one sentence names the file, the field and what was expected."""


def read_fields(path: Path) -> dict[str, Any]:
    """The card's fields, unchecked. Raises RouterFolderError for a file that is no JSON object of at most 1 MiB."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CARD_BYTES + 1)
        if len(raw) > MAX_CARD_BYTES:
            raise RouterFolderError(f"{CARD_FILE}: expected at most {MAX_CARD_BYTES} bytes")
        fields = json.loads(raw, parse_constant=_no_constant)
        _check_depth(fields, MAX_DEPTH)
        json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair is no text
        if len(json.dumps(fields)) > MAX_CARD_BYTES:
            raise RouterFolderError(f"{CARD_FILE}: expected at most {MAX_CARD_BYTES} bytes of ASCII")
    except OSError as error:
        raise RouterFolderError(f"{CARD_FILE}: expected a readable file ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise RouterFolderError(f"{CARD_FILE}: expected a JSON object ({error})") from error
    if not isinstance(fields, dict):
        raise RouterFolderError(f"{CARD_FILE}: expected a JSON object, got {type(fields).__name__}")
    return fields


def check_names(fields: Mapping[str, Any], required: AbstractSet[str], optional: AbstractSet[str]) -> None:
    """Raise RouterFolderError for a field that is missing or that nobody knows."""
    if missing := sorted(required - fields.keys()):
        raise RouterFolderError(f"{CARD_FILE}: field {missing[0]}: expected a value, got nothing")
    if unknown := sorted(fields.keys() - required - optional):
        raise RouterFolderError(f"{CARD_FILE}: field {unknown[0][:80]}: no such field")


def read_kind(folder: Path) -> str:
    """Which kind of router the folder says that it holds; nothing else is checked. Raises RouterFolderError."""
    fields = read_fields(folder / CARD_FILE)
    check_names(fields, {"kind"}, fields.keys())
    kind = fields["kind"]
    expect(is_text(kind, 1, 80), "kind", "a text of 1 to 80 characters")
    return str(kind)


def parse_common(fields: Mapping[str, Any]) -> tuple[str, str | None, dict[str, Any]]:
    """`sha256`, `name` and `training`, which the cards of all kinds have. Raises RouterFolderError."""
    expect(is_hex(fields["sha256"], 64), "sha256", "64 lower-case hex digits")
    name, training = fields.get("name"), fields.get("training", {})
    expect(name is None or is_text(name, 1, 200), "name", "a text of 1 to 200 characters")
    expect(isinstance(training, dict), "training", "an object")
    return fields["sha256"], name, training


def write_fields(folder: Path, fields: Mapping[str, Any]) -> None:
    """Replaces the card, in one step. Equal fields give equal bytes."""
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    partial = folder / f"{CARD_FILE}.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / CARD_FILE)


def check_digest(path: Path, sha256: str) -> None:
    """Raise RouterFolderError unless the tensors' file is there, not too large, and the one that the card names."""
    try:
        size = path.stat().st_size
        if size > MAX_CHANGE_BYTES:
            raise RouterFolderError(f"{CHANGE_FILE}: {size} bytes, expected at most {MAX_CHANGE_BYTES}")
        digest = file_sha256(path)
    except OSError as error:
        raise RouterFolderError(f"{CHANGE_FILE}: expected a readable file ({error.strerror})") from error
    if digest != sha256:
        raise RouterFolderError(f"{CARD_FILE}: field sha256: expected {digest}, that of {CHANGE_FILE}")


def file_sha256(path: Path) -> str:
    """The digest of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expect(holds: bool, name: str, expected: str) -> None:
    """Raise RouterFolderError for a field that is not as it should be."""
    if not holds:
        raise RouterFolderError(f"{CARD_FILE}: field {name}: expected {expected}")


def is_text(value: object, shortest: int, longest: int) -> bool:
    """Whether it is a text of so many characters."""
    return isinstance(value, str) and shortest <= len(value) <= longest


def is_hex(value: object, length: int) -> bool:
    """Whether it is so many lower-case hex digits."""
    return isinstance(value, str) and len(value) == length and set(value) <= set("0123456789abcdef")


def is_whole(value: object, least: int, most: int) -> bool:
    """Whether it is a whole number in these bounds; JSON's true and false are none."""
    return type(value) is int and least <= value <= most


def is_number(value: object) -> bool:
    """Whether it is a number that fits a finite fp64."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # JSON's whole numbers have no bound
        return False


def _check_depth(value: object, most: int) -> None:
    """Raise ValueError for what is nested more deeply."""
    if not isinstance(value, dict | list):
        return
    if not most:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    for each in value.values() if isinstance(value, dict) else value:
        _check_depth(each, most - 1)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
