"""Texts that wait to be embedded, and which of them share the next forward pass."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

WINDOW = 512
"""So many of the oldest texts are looked at for one pass; with more, looking would cost as much as embedding."""

SHORT_TOKENS = 64
"""Texts up to this length share a pass whatever their lengths: there the pass's fixed cost outweighs the padding."""

BYTES_PER_TOKEN = 4
SPECIAL_TOKENS = 12
"""The instruction before each text, and the marks around it."""


@dataclass(frozen=True, slots=True)
class Text:
    """One text for the encoder `encoder`: the base plus the trained router in the folder `change`, or `plain`."""

    number: int
    encoder: str
    change: str | None
    text: str
    tokens: int
    plain: bool = False

    @classmethod
    def of(
        cls, number: int, encoder: str, change: str | None, text: str, max_tokens: int, plain: bool = False
    ) -> "Text":
        """With its length estimated from its bytes: rough, but it only decides who shares a pass."""
        longest = max_tokens * BYTES_PER_TOKEN
        size = len(text[:longest].encode("utf-8", "replace")) // BYTES_PER_TOKEN
        return cls(number, encoder, change, text, min(SPECIAL_TOKENS + size, max_tokens), plain)


@dataclass(frozen=True, slots=True)
class PassLimits:
    """What one forward pass may hold: texts, and tokens including padding; the oldest text always goes.

    A query that arrives during a pass waits for its end, so that a pass is no larger than throughput needs. On a CPU
    thread all-MiniLM-L6-v2 takes 8.5 ms and 0.24 a token: with 384 tokens it is within 2 % of its best throughput, and
    the mean of 32 short prompts that come at once waits a fifth less than for one pass of them all. On a GPU a pass of
    `padded` tokens takes no longer than a short one, so that up to there lengths do not matter.
    """

    texts: int
    tokens: int
    bulk_tokens: int
    padded: int = 0

    @classmethod
    def of(cls, device: str, max_batch: int) -> "PassLimits":
        """Small passes on a CPU; a GPU needs many rows before it is busy."""
        return cls(max_batch, 384, 256) if device == "cpu" else cls(max_batch, 1 << 16, 1 << 13, padded=1 << 12)


class Waiting:
    """Two queues: queries, which somebody waits for, and bulk, taken only when no query waits."""

    def __init__(self, limits: PassLimits) -> None:
        self.limits = limits
        self._queries: dict[int, Text] = {}
        self._bulk: dict[int, Text] = {}

    def __len__(self) -> int:
        return len(self._queries) + len(self._bulk)

    def add(self, text: Text, *, bulk: bool) -> None:
        """A text that waits from now on."""
        (self._bulk if bulk else self._queries)[text.number] = text

    def hurry(self, numbers: Iterable[int]) -> None:
        """Make queries of these, if they wait in bulk."""
        for number in numbers:
            if (text := self._bulk.pop(number, None)) is not None:
                self._queries[number] = text

    def forget(self, numbers: Iterable[int]) -> None:
        """These wait no longer."""
        for number in numbers:
            self._queries.pop(number, None)
            self._bulk.pop(number, None)

    def take(self) -> list[Text]:
        """The texts of the next pass, of one encoder and sorted by length; empty if nothing waits.

        The oldest always goes, so that none waits for ever. It is joined by those nearest to it in length, as long as
        the pass stays within its limits and no text is padded to more than twice its length (`SHORT_TOKENS` aside, and
        passes of up to `padded` tokens).
        """
        queue = self._queries or self._bulk
        if not queue:
            return []
        most_tokens = self.limits.tokens if self._queries else self.limits.bulk_tokens
        window = list(islice(queue.values(), WINDOW))
        oldest = window[0]
        near = [text for text in window if text.encoder == oldest.encoder]
        near.sort(key=lambda text: (text is not oldest, abs(text.tokens - oldest.tokens)))
        taken: list[Text] = []
        shortest = longest = oldest.tokens
        for text in near:
            low, high = min(shortest, text.tokens), max(longest, text.tokens)
            padded = high * (len(taken) + 1)
            is_alike = high <= max(2 * low, SHORT_TOKENS) or padded <= self.limits.padded
            fits = len(taken) < self.limits.texts and padded <= most_tokens and is_alike
            if fits or not taken:
                taken.append(text)
                shortest, longest = low, high
        for text in taken:
            del queue[text.number]
        return sorted(taken, key=lambda text: text.tokens)
