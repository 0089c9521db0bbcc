"""The host tier: recently used adapters in this process's memory, packed as the device takes them."""

from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from adapters_store.pages import PackedAdapter, pack
from adapters_store.peft_format import mapped_weights
from adapters_store.types import LinearShape

Read = Callable[[str, str], PackedAdapter]
"""(digest, local folder) to the packed adapter; called by any thread."""


def folder_reader(
    shape: LinearShape,
    dtype: torch.dtype,
    *,
    pinned: bool = False,
    check: Callable[[Mapping[str, int]], None] = lambda _: None,
) -> Read:
    """Reads and packs PEFT folders, into page-locked memory if `pinned`; raises what `mapped_weights` and `pack` raise.

    Folders come from verified blobs: neither their digest nor their values are looked at again. `check` is given
    `AdapterWeights.group_ranks` before anything is packed, and may raise.
    """

    def read(digest: str, path: str) -> PackedAdapter:
        with mapped_weights(Path(path), shape, digest) as weights:
            check(weights.group_ranks)
            return pack(weights, shape, dtype, pinned=pinned)

    return read


@dataclass
class TierCounters:
    """What the tier did since the start."""

    hits: int = 0
    loads: int = 0
    evictions: int = 0
    shrinks: int = 0


class HostTier:
    """Packed adapters by digest, at most `budget_bytes` of them, the least recently used ones dropped first.

    `moved` collects the digests that came or went, for whoever reports them. An adapter that a caller still holds
    stays alive outside the budget until it lets go. Not thread-safe.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.num_bytes = 0
        self.counters = TierCounters()
        self.moved: set[str] = set()
        self._entries: OrderedDict[str, PackedAdapter] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    @property
    def has_room(self) -> bool:
        """Whether one more adapter as large as those here would fit."""
        another = self.num_bytes // max(1, len(self._entries))
        return self.num_bytes + max(1, another) <= self.budget_bytes

    def get(self, digest: str) -> PackedAdapter | None:
        """The adapter, from here on the most recently used one, or None if it is not here."""
        packed = self._entries.get(digest)
        if packed is not None:
            self._entries.move_to_end(digest)
            self.counters.hits += 1
        return packed

    def insert(self, packed: PackedAdapter, keep: Container[str] = ()) -> bool:
        """Take an adapter in that has been read, dropping others except those in `keep`.

        False if it does not fit all the same; then nothing is dropped.
        """
        self.counters.loads += 1
        if packed.digest in self._entries:
            return True
        victims, missing = [], self.num_bytes + packed.num_bytes - self.budget_bytes
        for digest, entry in self._entries.items():
            if missing <= 0:
                break
            if digest not in keep:
                victims.append(digest)
                missing -= entry.num_bytes
        if missing > 0:
            return False
        for digest in victims:
            self.drop(digest)
        self.counters.evictions += len(victims)
        self._entries[packed.digest] = packed
        self.num_bytes += packed.num_bytes
        self.moved.add(packed.digest)
        return True

    def drop(self, digest: str) -> None:
        """Forget an adapter if it is here."""
        packed = self._entries.pop(digest, None)
        if packed is not None:
            self.num_bytes -= packed.num_bytes
            self.moved.add(digest)

    def resize(self, budget_bytes: int, keep: Container[str] = ()) -> None:
        """Change the budget, dropping what is beyond it except those in `keep`, for which it stays large enough."""
        for digest in [digest for digest in self._entries if digest not in keep]:
            if self.num_bytes <= budget_bytes:
                break
            self.drop(digest)
            self.counters.evictions += 1
        self.budget_bytes = max(budget_bytes, self.num_bytes)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the bytes add up, within the budget."""
        total = sum(packed.num_bytes for packed in self._entries.values())
        if total != self.num_bytes or total > self.budget_bytes:
            raise RuntimeError(f"host tier holds {total} bytes, counts {self.num_bytes}, budget {self.budget_bytes}")
