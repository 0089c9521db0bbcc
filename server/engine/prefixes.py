"""Where beginnings of prompts were computed lately, known by hashes: as much as placement needs, and no tokens."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

SHORTEST = 32
LONGEST = 8192
KEPT = 20_000

Prefixes = tuple[tuple[bytes, int], ...]
"""(hash, tokens) of growing beginnings of one prompt."""


def prompt_prefixes(root: bytes, prompt: Sequence[int]) -> Prefixes:
    """The beginnings of 32, 64, 128 ... tokens of a prompt whose KV is cached under `root`.

    Each is twice as long as the one before, so that a prompt of any length costs nine hashes at most; the last token
    is left out, since it is computed even where all of a prompt is cached.
    """
    hasher = hashlib.blake2b(key=hashlib.sha256(root).digest(), digest_size=16)
    found: list[tuple[bytes, int]] = []
    start, stop = 0, SHORTEST
    while stop < len(prompt) and stop <= LONGEST:
        hasher.update(array("q", prompt[start:stop]).tobytes())
        found.append((hasher.digest(), stop))
        start, stop = stop, 2 * stop
    return tuple(found)


class PrefixTable:
    """Which engines have computed a beginning, of the `kept` that were used last."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._engines: OrderedDict[bytes, int] = OrderedDict()  # a bit for each engine

    def __len__(self) -> int:
        return len(self._engines)

    def add(self, prefixes: Prefixes, engine: int) -> None:
        """The engine computes a prompt that begins so."""
        for name, _ in prefixes:
            self._engines[name] = self._engines.pop(name, 0) | 1 << engine
        while len(self._engines) > self._kept:
            self._engines.popitem(last=False)

    def cached(self, prefixes: Prefixes, engine: int) -> int:
        """Tokens of the longest of these beginnings that the engine has computed."""
        for name, tokens in reversed(prefixes):
            if self._engines.get(name, 0) >> engine & 1:
                return tokens
        return 0

    def forget(self, engine: int) -> None:
        """The engine has lost its memory."""
        kept = ((name, engines & ~(1 << engine)) for name, engines in self._engines.items())
        self._engines = OrderedDict((name, engines) for name, engines in kept if engines)
