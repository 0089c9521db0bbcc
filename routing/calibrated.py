"""Cosine similarities below which a prompt belongs to none of the adapters, for encoders that were measured."""

from collections.abc import Mapping
from types import MappingProxyType

MIN_SCORES: Mapping[str, float] = MappingProxyType({"4c78e395c736ac95": 0.722})
"""By encoder id. all-MiniLM-L6-v2 with the instruction prefix, which alone makes any two texts similar: 60 everyday
prompts against 36 adapters, of which 3 score higher; 12 % of the prompts that belong to an adapter score lower
(docs/results.md)."""
FALLBACK = 0.3
"""For encoders that nobody has measured."""


def min_score(encoder: str) -> float:
    """What `loramux eval routing` found for the encoder of this id, else a guess."""
    return MIN_SCORES.get(encoder, FALLBACK)
