"""Stop strings in a text that comes in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Finds the first stop string to be completed, wherever the borders of the pieces lie.

    Text that may still become a stop string is held back; neither a stop string nor anything after it is ever given
    out. Where two are completed by the same character, the longer one counts. Matching is Knuth-Morris-Pratt, one
    automaton a string: constant time a character however long the strings are.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._failures = tuple(_failure_table(stop) for stop in self._stops)
        self._matched = [0] * len(self._stops)
        self._held = ""
        self.hit: str | None = None

    def feed(self, text: str) -> str:
        """The part of what is known so far that can be given out. After a hit nothing more comes."""
        if not self._stops:
            return text
        if self.hit is not None:
            return ""
        for position, character in enumerate(text):
            self.hit = self._advance(character)
            if self.hit is not None:
                whole = self._held + text[: position + 1]
                self._held = ""
                return whole.removesuffix(self.hit)
        whole = self._held + text
        keep = len(whole) - max(self._matched)
        self._held = whole[keep:]
        return whole[:keep]

    def flush(self) -> str:
        """What was held back and became no stop string. The text has ended."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        for index, stop in enumerate(self._stops):
            matched, failure = self._matched[index], self._failures[index]
            while matched and stop[matched] != character:
                matched = failure[matched - 1]
            matched += stop[matched] == character
            if matched == len(stop):
                return stop
            self._matched[index] = matched
        return None


def _failure_table(stop: str) -> list[int]:
    """For every prefix of `stop` the length of its longest border (Knuth, Morris and Pratt 1977)."""
    table = [0] * len(stop)
    border = 0
    for index in range(1, len(stop)):
        while border and stop[index] != stop[border]:
            border = table[border - 1]
        border += stop[index] == stop[border]
        table[index] = border
    return table
