"""An encoder whose similarity is the share of words that two texts have in common."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from routing.encoder import EncoderUnavailable

WIDTH = 256


class WordEncoder:
    """Stands for the encoder process and for the encoder that it gives."""

    id = "0123456789abcdef"
    width = WIDTH

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failure: str | None = None

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def encoder(self, change: Path | None = None) -> "WordEncoder":
        if change is not None:
            raise EncoderUnavailable("words cannot be trained")
        return self

    def plain_encoder(self) -> "WordEncoder":
        return self

    async def embed(
        self,
        texts: Sequence[str],
        *,
        tenant: str = "",  # noqa: ARG002
        bulk: bool = False,  # noqa: ARG002
    ) -> np.ndarray:
        if self.failure is not None:
            raise EncoderUnavailable(self.failure)
        return np.stack([_vector(text) for text in texts])


def _vector(text: str) -> np.ndarray:
    vector = np.full(WIDTH, 1e-6, np.float32)
    for word in text.lower().split():
        vector[hashlib.sha256(word.encode()).digest()[0]] += 1.0
    return np.asarray(vector / np.linalg.norm(vector), np.float32)
