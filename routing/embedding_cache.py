"""Embeddings of the texts that were asked for last."""

import hashlib
from collections import OrderedDict

import numpy as np

Key = tuple[str, str, bytes]


def text_key(encoder: str, tenant: str, text: str) -> Key:
    """The encoder's id, whose text it is, and its sha256.

    Lone surrogates, which JSON can carry, count as question marks.
    """
    return encoder, tenant, hashlib.sha256(text.encode("utf-8", "replace")).digest()


class EmbeddingCache:
    """At most `capacity` embeddings; the one that was not read for longest leaves first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._rows: OrderedDict[Key, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: Key) -> np.ndarray | None:
        """The row, (width,) float32 and read-only, or None."""
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
        return row

    def put(self, key: Key, row: np.ndarray) -> None:
        """Keep a row."""
        self._rows[key] = row
        self._rows.move_to_end(key)
        while len(self._rows) > self.capacity:
            self._rows.popitem(last=False)
