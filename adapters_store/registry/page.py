"""Lists in parts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """Part of a list; `next` is the cursor of the following part, None at the end."""

    items: tuple[T, ...]
    next: str | None


def paginate(rows: Sequence[T], limit: int, cursor: Callable[[T], str]) -> Page[T]:
    """`rows` were asked for with one more than `limit`."""
    return Page(tuple(rows[:limit]), cursor(rows[limit - 1]) if len(rows) > limit else None)
