"""The host tier: recently used adapters in this process's memory, between the disk and the device pages."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapters_store.peft_format import read_adapter
from adapters_store.types import AdapterError, AdapterWeights, LinearShape

Read = Callable[[str, str], AdapterWeights]
"""(digest, local folder) to weights."""


def folder_reader(shape: LinearShape) -> Read:
    """Reads PEFT folders; raises AdapterError `adapter_corrupt` where a folder no longer holds its digest."""

    def read(digest: str, path: str) -> AdapterWeights:
        weights = read_adapter(Path(path), shape).weights
        if weights.digest != digest:
            raise AdapterError(
                "adapter_corrupt",
                f"adapter folder {Path(path).name!r} holds digest {weights.digest[:12]}, expected {digest[:12]}: "
                "its files changed after registration",
            )
        return weights

    return read


@dataclass
class TierCounters:
    """What the tier did since the start."""

    hits: int = 0
    loads: int = 0
    evictions: int = 0


class HostTier:
    """Weights by digest, at most `budget_bytes` of them, the least recently used ones dropped first.

    Weights that a caller still holds stay alive outside the budget until it lets go. Not thread-safe.
    """

    def __init__(self, budget_bytes: int, read: Read) -> None:
        self.budget_bytes = budget_bytes
        self.num_bytes = 0
        self.counters = TierCounters()
        self._read = read
        self._entries: OrderedDict[str, AdapterWeights] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def has_room(self) -> bool:
        """Whether one more adapter as large as those here would fit."""
        return self.num_bytes + self.num_bytes // max(1, len(self._entries)) <= self.budget_bytes

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def get(self, digest: str, path: str) -> AdapterWeights:
        """The weights of `digest`, read from the folder `path` unless they are here.

        Raises AdapterError `adapter_too_large` (413) for one larger than the whole budget, and what reading raises.
        """
        weights = self._entries.get(digest)
        if weights is not None:
            self._entries.move_to_end(digest)
            self.counters.hits += 1
            return weights
        weights = self._read(digest, path)
        if weights.num_bytes > self.budget_bytes:
            raise AdapterError(
                "adapter_too_large",
                f"adapter {digest[:12]} takes {weights.num_bytes} bytes, expected at most the host budget of "
                f"{self.budget_bytes} bytes",
                413,
            )
        self.counters.loads += 1
        self._make_room(weights.num_bytes)
        self._entries[digest] = weights
        self.num_bytes += weights.num_bytes
        return weights

    def drop(self, digest: str) -> None:
        """Forget an adapter if it is here."""
        weights = self._entries.pop(digest, None)
        if weights is not None:
            self.num_bytes -= weights.num_bytes

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the bytes add up, within the budget."""
        total = sum(weights.num_bytes for weights in self._entries.values())
        if total != self.num_bytes or total > self.budget_bytes:
            raise RuntimeError(f"host tier holds {total} bytes, counts {self.num_bytes}, budget {self.budget_bytes}")

    def _make_room(self, num_bytes: int) -> None:
        while self.num_bytes + num_bytes > self.budget_bytes:
            _, weights = self._entries.popitem(last=False)
            self.num_bytes -= weights.num_bytes
            self.counters.evictions += 1
