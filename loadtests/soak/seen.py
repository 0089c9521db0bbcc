"""What the clients have seen."""

from collections import Counter
from dataclasses import dataclass, field


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
        self.broken.append(sentence)
