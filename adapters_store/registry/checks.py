"""What a name and a text of the registry may be."""

import re
from typing import Any

from sqlalchemy import Row

from adapters_store.registry.errors import InvalidValue, NotFound

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"


def check_name(kind: str, name: str) -> None:
    """Raises InvalidValue for a name that nothing may get."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise InvalidValue(f"{kind} name {name!r} is not allowed: expected {NAME_PATTERN}", "invalid_name")


def check_text(field: str, value: str) -> None:
    """Raises InvalidValue for text that one of the databases refuses: NUL, or half a surrogate pair."""
    if "\0" in value or (not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value)):
        raise InvalidValue(f"{field!r} has a character that cannot be stored: expected Unicode text without NUL")


def seek_name(kind: str, name: str) -> None:
    """What cannot be a name does not exist: raises NotFound."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise NotFound(kind, name)


def must_exist(row: Row[Any] | None, kind: str, name: str) -> Row[Any]:
    """Raises NotFound for None."""
    if row is None:
        raise NotFound(kind, name)
    return row
