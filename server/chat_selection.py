"""Who answers in a terminal chat: the base model, adapters with weights, or whom a router chooses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

COMPOSITIONS = ("mixture", "fusion", "selection")


class SelectionError(ValueError):
    """What was typed names no adapters. The message is one line."""


@dataclass(frozen=True)
class Selection:
    """`adapters` by name, with weights where they were given. Otherwise `model` decides: the base, `auto`, a router."""

    model: str
    adapters: tuple[tuple[str, float | None], ...] = ()
    composition: str | None = None

    @property
    def label(self) -> str:
        """In few words, as it can be typed."""
        if not self.adapters:
            return self.model
        names = " ".join(name if weight is None else f"{name}={weight:g}" for name, weight in self.adapters)
        return names if self.composition is None else f"{names} as {self.composition}"

    def fields(self) -> dict[str, Any]:
        """The fields of a request. One adapter without a weight is what its name as the model means."""
        if len(self.adapters) == 1 and self.adapters[0][1] is None and self.composition is None:
            return {"model": self.adapters[0][0]}
        if not self.adapters:
            return {"model": self.model}
        adapters = [{"name": name, **({} if weight is None else {"weight": weight})} for name, weight in self.adapters]
        composition = {} if self.composition is None else {"composition": self.composition}
        return {"model": self.model, "lora": {"adapters": adapters, **composition}}


def parse_adapters(words: Sequence[str], base: str) -> Selection:
    """`pirate redact=0.5`, with `as fusion` behind it if need be. Raises SelectionError."""
    composition = None
    if len(words) > 1 and words[-2] == "as":
        composition, words = words[-1], words[:-2]
        if composition not in COMPOSITIONS:
            raise SelectionError(f"as {composition}: expected {', '.join(COMPOSITIONS)}")
    if not words:
        raise SelectionError("expected adapters, such as: pirate redact=0.5")
    adapters = tuple(_adapter(word) for word in words)
    names = [name for name, _ in adapters]
    if len(set(names)) < len(names):
        raise SelectionError("an adapter is named twice")
    return Selection(base, adapters, composition)


def _adapter(word: str) -> tuple[str, float | None]:
    name, is_weighted, text = word.partition("=")
    try:
        weight = float(text) if is_weighted else None
    except ValueError:
        weight = math.nan
    if not name or (weight is not None and not math.isfinite(weight)):
        raise SelectionError(f"{word}: expected an adapter, or one with its weight, such as pirate=0.5")
    return name, weight
