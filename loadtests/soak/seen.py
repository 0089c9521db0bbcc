"""What the clients have seen."""

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

MOST_SENTENCES = 1000
"""More of them say nothing more: a server that is gone breaks every request."""


@dataclass
class Seen:
    """Endings by kind, and the tokens of the tenant whose bill is compared. `broken` are sentences."""

    endings: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    compared: int = 0
    broken: list[str] = field(default_factory=list)

    def breaks(self, sentence: str) -> None:
        """Something does not hold."""
        if len(self.broken) < MOST_SENTENCES:
            self.broken.append(sentence)

    @contextmanager
    def telling(self, what: str) -> Iterator[None]:
        """An exception in the block is something that does not hold, and ends nothing but the block."""
        try:
            yield
        except Exception as error:
            self.endings[type(error).__name__] += 1
            self.breaks(f"{what} failed: {error!r} at {_place(error)}")


def _place(error: Exception) -> str:
    """Where it was raised, behind the line of the load tests that led there."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    ours = [frame for frame in frames if "loadtests" in Path(frame.filename).parts]
    shown = dict.fromkeys(f"{Path(frame.filename).name}:{frame.lineno}" for frame in (*ours[-1:], *frames[-1:]))
    return ", ".join(shown)
