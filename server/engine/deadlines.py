"""Sequences that must have ended by a time of the engine's clock."""

import heapq
from itertools import count

from server.engine.sequence import Sequence

SPARE = 64  # entries of ended sequences that are kept at least before the heap is made anew


class Deadlines:
    """A heap. Entries of sequences that ended earlier stay in it until they are due, or too many."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self._numbers = count()
        self._lives: set[Sequence] = set()

    def __len__(self) -> int:
        return len(self._lives)

    def add(self, sequence: Sequence, timeout: float) -> None:
        """It must end `timeout` seconds after its arrival."""
        self._lives.add(sequence)
        heapq.heappush(self._heap, (sequence.arrival + timeout, next(self._numbers), sequence))

    def remove(self, sequence: Sequence) -> None:
        """It has ended; those without a deadline are left alone."""
        self._lives.discard(sequence)
        if len(self._heap) > 2 * len(self._lives) + SPARE:
            self._heap = [entry for entry in self._heap if entry[2] in self._lives]
            heapq.heapify(self._heap)

    def expired(self, now: float) -> list[Sequence]:
        """Those whose time has passed, the earliest first; each is told once."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            sequence = heapq.heappop(self._heap)[2]
            if sequence in self._lives:
                self._lives.remove(sequence)
                found.append(sequence)
        return found
