"""Rows of prototypes in one matrix, as few products and copies as possible."""

from collections.abc import Iterator, Sequence
from functools import reduce

import numpy as np
from numpy.typing import NDArray

Key = tuple[str, str]
"""(owner, name)"""

Vectors = NDArray[np.float32]

_FIRST = 16


class PrototypeRows:
    """Adapters that have equally many prototypes: `count` rows of `width` float32 each, without gaps.

    A removed adapter's rows are taken by the last one's, so that one product scores them all.
    """

    def __init__(self, count: int, width: int) -> None:
        self.count = count
        self.keys: list[Key] = []
        self._places: dict[Key, int] = {}
        self._matrix: Vectors = np.empty((_FIRST, count, width), np.float32)

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def get(self, key: Key) -> Vectors:
        """A copy of an adapter's vectors (count, width)."""
        vectors: Vectors = self._matrix[self._places[key]].copy()
        return vectors

    def put(self, key: Key, vectors: Vectors) -> None:
        """Add an adapter, or replace its vectors (count, width)."""
        place = self._places.get(key)
        if place is None:
            place = len(self.keys)
            if place == len(self._matrix):
                # In place: a large matrix moves its pages instead of its content.
                self._matrix.resize((2 * place, *self._matrix.shape[1:]), refcheck=False)
            self._places[key] = place
            self.keys.append(key)
        self._matrix[place] = vectors

    def remove(self, key: Key) -> None:
        """Forget an adapter that is there."""
        place, last = self._places.pop(key), self.keys.pop()
        if last != key:
            self._matrix[place] = self._matrix[len(self.keys)]
            self.keys[place] = last
            self._places[last] = place
        if _FIRST < len(self._matrix) >= 4 * len(self.keys):
            self._matrix.resize((len(self._matrix) // 2, *self._matrix.shape[1:]), refcheck=False)

    def scores(self, query: Vectors) -> Vectors:
        """The best product of each adapter's prototypes with the query (width,): (adapters,) float32."""
        return self._best(self._matrix[: len(self.keys)], query)

    def scores_of(self, keys: Sequence[Key], query: Vectors) -> Vectors:
        """As `scores`, of some that are there."""
        return self._best(self._matrix[[self._places[key] for key in keys]], query)

    def _best(self, matrix: Vectors, query: Vectors) -> Vectors:
        products = (matrix.reshape(-1, matrix.shape[-1]) @ query).reshape(-1, self.count)
        return np.asarray(reduce(np.maximum, products.T), np.float32)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless names and rows agree."""
        if self._places != {key: place for place, key in enumerate(self.keys)}:
            raise RuntimeError("the places of the prototypes differ from their keys")
        if len(self.keys) > len(self._matrix):
            raise RuntimeError(f"{len(self.keys)} adapters in {len(self._matrix)} places")


class RowsByCount:
    """Adapters with any number of prototypes, which an adapter may change."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._rows: dict[int, PrototypeRows] = {}
        self._counts: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._counts)

    def __contains__(self, key: Key) -> bool:
        return key in self._counts

    def put(self, key: Key, vectors: Vectors) -> None:
        count = len(vectors)
        if self._counts.get(key, count) != count:
            self.remove(key)
        if count not in self._rows:
            self._rows[count] = PrototypeRows(count, self._width)
        self._rows[count].put(key, vectors)
        self._counts[key] = count

    def remove(self, key: Key) -> None:
        count = self._counts.pop(key)
        self._rows[count].remove(key)
        if not self._rows[count]:
            del self._rows[count]

    def scores(self, query: Vectors) -> Iterator[tuple[Sequence[Key], Vectors]]:
        """Keys and their scores, in a few parts."""
        for rows in self._rows.values():
            yield rows.keys, rows.scores(query)

    def scores_of(self, keys: Sequence[Key], query: Vectors) -> Iterator[tuple[Sequence[Key], Vectors]]:
        """As `scores`, of some that are there."""
        by_count: dict[int, list[Key]] = {}
        for key in keys:
            by_count.setdefault(self._counts[key], []).append(key)
        for count, some in by_count.items():
            yield some, self._rows[count].scores_of(some, query)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every adapter is in the rows of its count, and nothing else is."""
        for count, rows in self._rows.items():
            rows.check_integrity()
            if not rows or any(self._counts.get(key) != count for key in rows.keys):
                raise RuntimeError(f"the rows of {count} prototypes differ from the counts")
        if sum(map(len, self._rows.values())) != len(self._counts):
            raise RuntimeError("there are more rows than adapters")
