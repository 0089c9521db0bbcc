"""What the server has said about adapters that come and go, and so has to keep."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Told:
    """By name, the digests that it may mean; None: no adapter. One of them: so the server has said it.

    What was answered with an error, or not at all, may have happened or not. `touched` counts attempts to change
    a name.
    """

    possible: dict[str, frozenset[str | None]] = field(default_factory=dict)
    touched: Counter[str] = field(default_factory=Counter)

    def certain(self, prefix: str = "") -> dict[str, str]:
        """Names that exist, with their digests."""
        found: dict[str, str] = {}
        for name, digests in self.possible.items():
            (digest,) = digests if len(digests) == 1 else (None,)
            if digest is not None and name.startswith(prefix):
                found[name] = digest
        return found

    def gone(self) -> list[str]:
        """Names that were deleted, or never came to be."""
        return [name for name, digests in self.possible.items() if digests == {None}]

    def uncertain(self) -> list[str]:
        """Names about which the server owes an answer."""
        return [name for name, digests in self.possible.items() if len(digests) > 1]

    def tries(self, name: str, digest: str | None) -> None:
        """Somebody asks that the name shall mean this; the answer is not there yet."""
        self.touched[name] += 1
        self.possible[name] = self.possible.get(name, frozenset((None,))) | {digest}

    def says(self, name: str, digest: str | None) -> bool:
        """The server has said what the name means. False if that cannot be."""
        is_possible = digest in self.possible.get(name, frozenset((None,)))
        self.possible[name] = frozenset((digest,))
        return is_possible
