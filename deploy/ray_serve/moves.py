"""Which adapters of an engine have moved between its tiers since somebody asked last."""

from collections.abc import Mapping

KEPT = 100_000


class Moves:
    """Numbered moves of digests; of each digest the last one, of all digests that are on disk the `kept` last.

    Whoever asks after so many moves that some are forgotten learns of adapters that left memory too late, or not.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self.version = 0
        self._kept = kept
        self._moves: dict[str, tuple[int, str]] = {}  # in the order of their numbers

    def moved(self, digest: str, tier: str) -> None:
        """An adapter is in another tier."""
        self.version += 1
        self._moves.pop(digest, None)
        self._moves[digest] = self.version, tier
        if len(self._moves) > self._kept:
            gone = next((each for each, (_, tier) in self._moves.items() if tier == "disk"), None)
            if gone is not None:
                del self._moves[gone]

    def since(self, version: int) -> Mapping[str, str]:
        """Where those digests are that have moved after this version."""
        found: dict[str, str] = {}
        for digest, (number, tier) in reversed(self._moves.items()):
            if number <= version:
                break
            found[digest] = tier
        return found
