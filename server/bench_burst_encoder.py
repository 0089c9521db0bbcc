"""Encoders that note when their passes begin and end, for server/bench_burst.py; the encoder's process loads them."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from routing.encoder_model import EncoderModel, encoder_id, normalised, plain_id
from routing.encoder_width import encoder_width

NOTES = "LORAMUX_BENCH_PASSES"
"""Environment: the file for the notes, a line of JSON for each pass."""
PASS_MS = "LORAMUX_BENCH_PASS_MS"
"""Environment: what a pass of the table takes, during which no processor works."""


class NotedModel(EncoderModel):
    """The real one. Of a pass it notes begin, end and the part of reading tokens."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """As EncoderModel does."""
        return _noted(texts, lambda: super(NotedModel, self).embed(texts), self._clocked)

    def _clocked(self, spent: dict[str, float]) -> None:
        """Whatever this pass reads counts in `spent`."""
        preprocess = type(self.model).preprocess

        def read(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return preprocess(self.model, *arguments, **named)
            finally:
                spent["tokens"] = spent.get("tokens", 0.0) + time.perf_counter() - started

        self.model.preprocess = read


class TableModel:
    """A fixed vector for every text, after as many milliseconds as the environment says, in a whole pass."""

    max_tokens = 256

    def __init__(self, identity: str, width: int) -> None:
        self.id = identity
        self.width = width
        self._seconds = float(os.environ[PASS_MS]) / 1e3

    @classmethod
    def load(cls, folder: Path, change: Path | None = None, *, device: str = "cpu") -> "TableModel":  # noqa: ARG003
        return cls(encoder_id(folder, change), encoder_width(folder))

    def plain(self) -> "TableModel":
        return TableModel(plain_id(self.id), self.width)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Rows of length 1 (n, width) float32."""

        def look_up() -> np.ndarray:
            time.sleep(self._seconds)
            return normalised(np.stack([self._row(text) for text in texts]))

        return _noted(texts, look_up)

    def _row(self, text: str) -> np.ndarray:
        digest = hashlib.shake_128(text.encode()).digest(self.width)
        return np.frombuffer(digest, np.uint8).astype(np.float32) - 127.5


def _noted(
    texts: Sequence[str], work: Callable[[], np.ndarray], clocked: Callable[[dict[str, float]], None] | None = None
) -> np.ndarray:
    spent: dict[str, float] = {}
    if clocked is not None:
        clocked(spent)
    begin = time.perf_counter()
    found = work()
    note = {"texts": list(texts), "begin": begin, "end": time.perf_counter(), "tokens": spent.get("tokens", 0.0)}
    with Path(os.environ[NOTES]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(note) + "\n")
    return found
