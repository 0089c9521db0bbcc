"""ROUGE-1 and ROUGE-L (Lin 2004), F1 of one answer against the best of its references.

Tokens are runs of letters and digits, lower-cased, without stemming.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(r"[^\W_]+")


def rouge_1(answer: str, references: Sequence[str]) -> float:
    """F1 of shared words, each counted as often as in both, in [0, 1]."""
    own = Counter(_words(answer))
    return max(_f1((own & other).total(), own.total(), other.total()) for other in map(Counter, _split(references)))


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words, in [0, 1]."""
    own = _words(answer)
    return max(_f1(_common(own, other), len(own), len(other)) for other in _split(references))


def _split(texts: Sequence[str]) -> list[list[str]]:
    return [_words(text) for text in texts]


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _f1(shared: int, found: int, wanted: int) -> float:
    return 2 * shared / (found + wanted) if shared else 0.0


def _common(left: Sequence[str], right: Sequence[str]) -> int:
    lengths = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for place, other in enumerate(right, start=1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == other else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]
