"""Sentence BLEU-4 (Papineni et al. 2002), of one answer against its references."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

TOKEN = re.compile(r"\w+|[^\w\s]")
LONGEST = 4


def bleu(answer: str, references: Sequence[str]) -> float:
    """BLEU in [0, 1]: geometric mean of clipped 1- to 4-gram precisions times the brevity penalty.

    Counts of n-grams above single tokens are smoothed by one (Lin & Och 2004), since a single sentence often shares no
    4-gram. Tokens are lower-cased words and single punctuation marks. Of the references the closest length counts,
    the shorter one of two.
    """
    own, others = _tokens(answer), [_tokens(text) for text in references]
    if not own:
        return 0.0
    logs = 0.0
    for size in range(1, LONGEST + 1):
        found, most = _grams(own, size), Counter[tuple[str, ...]]()
        for other in others:
            most |= _grams(other, size)
        matched, total, smoothing = (found & most).total(), found.total(), int(size > 1)
        if matched + smoothing == 0:
            return 0.0
        logs += math.log((matched + smoothing) / (total + smoothing))
    closest = min((abs(len(other) - len(own)), len(other)) for other in others)[1]
    return math.exp(logs / LONGEST + min(0.0, 1 - closest / len(own)))


def _tokens(text: str) -> list[str]:
    return TOKEN.findall(text.lower())


def _grams(tokens: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1))
