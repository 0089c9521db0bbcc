"""Device memory for adapters: rank pages per target group, taken by whole mixes and kept until others need them."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from adapters_store.merge import fuse
from adapters_store.pages import PackedGroup, pack, pages_needed
from adapters_store.types import GROUPS, PAGE_RANK, AdapterWeights, Composition, LinearShape, Mix
from adapters_store.upload import Uploader

Load = Callable[[str], AdapterWeights]
"""Gives the weights of a digest from the host tier; the same digest always gives the same weights."""


@dataclass(eq=False)
class PageLease:
    """The pages of one mix while a sequence runs; given back exactly once by `PagePool.release`.

    `pages[group]` and `weights[group]` run in parallel over all pages of all adapters of the mix, for every group name;
    a weight is the mix's weight times the adapter's own scale. `ranks[group]`: the rank rows of each page that are in
    use. `keys` are the residents that own the pages.
    """

    mix: Mix
    pages: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, tuple[float, ...]]
    ranks: Mapping[str, tuple[int, ...]]
    keys: tuple[str, ...]
    released: bool = False


@dataclass(eq=False)
class _Resident:
    """An adapter, or a materialised fusion, on the device: page ids, their ranks and the scale, by group name."""

    pages: dict[str, tuple[int, ...]]
    scales: dict[str, float]
    ranks: dict[str, tuple[int, ...]]
    references: int = 0


@dataclass
class PoolCounters:
    """Residents written to and dropped from the device since the start."""

    loads: int = 0
    evictions: int = 0


class PagePool:
    """A fixed number of rank pages per target group, with reference counts and least-recently-used eviction.

    `num_pages` is the number of pages of every group, or one by group name. `tensors[group]` is the pair
    a (layers, pages, S * 16, in), b (layers, pages, 16, sum(out)) that the kernels read, zero at first.
    Free pages are given out lowest id first, so that residents lie together. Not thread-safe.
    """

    def __init__(
        self, shape: LinearShape, num_pages: Mapping[str, int] | int, device: torch.device, dtype: torch.dtype
    ) -> None:
        if isinstance(num_pages, int):
            num_pages = {group.name: num_pages for group in GROUPS}
        if set(num_pages) != {group.name for group in GROUPS} or min(num_pages.values()) < 1:
            raise ValueError(f"num_pages must give at least one page for each of {[group.name for group in GROUPS]}")
        self.shape = shape
        self.num_pages: Mapping[str, int] = dict(num_pages)
        self.device = device
        self.dtype = dtype
        self.tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = {
            group.name: self._allocate(group.name) for group in GROUPS
        }
        self.counters = PoolCounters()
        self._upload = Uploader(device)
        self._free = {name: list(range(count)) for name, count in self.num_pages.items()}
        self._residents: dict[str, _Resident] = {}
        self._idle: dict[str, None] = {}  # unreferenced residents, the least recently used first
        self._leases: set[PageLease] = set()
        self._pins: dict[str, PageLease] = {}
        self._ranks: dict[str, dict[str, int]] = {}

    @property
    def num_bytes(self) -> int:
        """Device memory of the pages, in bytes; equal to `page_bytes` times pages, summed over the groups."""
        return sum(a.nbytes + b.nbytes for a, b in self.tensors.values())

    @property
    def residents(self) -> tuple[str, ...]:
        """Digests of the adapters, and of the materialised fusions, that are on the device."""
        return tuple(self._residents)

    def fits(self, mix: Mix, ranks: Mapping[str, Mapping[str, int]]) -> bool:
        """Whether `mix` could be acquired if only pins held pages. `ranks[digest]` is `AdapterWeights.group_ranks`."""
        needed = pages_needed(mix, ranks)
        keys = _keys(mix)
        pinned = self._owned(key for key in self._pins if key not in keys)
        return all(needed[name] + pinned[name] <= count for name, count in self.num_pages.items())

    def acquire(self, mix: Mix, load: Load) -> PageLease | None:
        """All pages of `mix`, resident and safe from eviction until released, or None if they do not fit now.

        None changes nothing on the device. `load` is called for adapters that must be written, and once for one whose
        size is not known yet. Whatever it raises leaves the pool as it was.
        """
        keys = _keys(mix)
        missing = [key for key in keys if key not in self._residents]
        if missing:
            sources = mix.digests if mix.composition is Composition.FUSION else missing
            loaded = self._learn(sources, load)
            victims = self._choose_victims(self._needed(mix, missing), keep=keys)
            if victims is None:
                return None
            loaded |= {digest: load(digest) for digest in sources if digest not in loaded}
            packed = {key: pack(weights, self.shape, self.dtype) for key, weights in self._wanted(mix, loaded).items()}
            for key in victims:
                self._evict(key)
            for key, groups in packed.items():
                self._write(key, groups)
        return self._lease(mix, keys)

    def release(self, lease: PageLease) -> None:
        """Give a lease back; its adapters stay until their pages are needed. Raises RuntimeError the second time."""
        if lease.released or lease not in self._leases:
            raise RuntimeError(f"lease of mix {lease.mix.digest[:12]} is released already or not of this pool")
        lease.released = True
        self._leases.remove(lease)
        for key in lease.keys:
            resident = self._residents[key]
            resident.references -= 1
            if resident.references == 0:
                self._idle[key] = None

    def pin(self, digest: str, load: Load) -> bool:
        """Keep an adapter resident until `unpin`.

        False if its pages do not fit now, or if pins would then own more than half of the pages of some group.
        """
        if digest in self._pins:
            return True
        mix = Mix(((digest, 1.0),))
        self._learn(mix.digests, load)
        pinned, needed = self._owned(self._pins), self._needed(mix, mix.digests)
        if any(pinned[name] + needed[name] > count // 2 for name, count in self.num_pages.items()):
            return False
        lease = self.acquire(mix, load)
        if lease is None:
            return False
        self._pins[digest] = lease
        return True

    def unpin(self, digest: str) -> None:
        """Undo `pin`. Raises KeyError if the adapter is not pinned."""
        self.release(self._pins.pop(digest))

    def pages_by_state(self) -> dict[str, int]:
        """Pages over all groups that are `free`, `used` (leased or pinned) or `cached` (resident, may be evicted)."""
        free = sum(len(pages) for pages in self._free.values())
        cached = self._owned(self._idle).total()
        return {"free": free, "used": sum(self.num_pages.values()) - free - cached, "cached": cached}

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every page has exactly one owner and the reference counts equal the leases."""
        for name, count in self.num_pages.items():
            owned = [page for resident in self._residents.values() for page in resident.pages.get(name, ())]
            if sorted(owned + self._free[name]) != list(range(count)):
                raise RuntimeError(f"pages of group {name}: owned {sorted(owned)}, free {sorted(self._free[name])}")
        references = Counter(key for lease in self._leases for key in lease.keys)
        if references != +Counter({key: resident.references for key, resident in self._residents.items()}):
            raise RuntimeError(f"residents' reference counts differ from the leases': {references}")
        if self._idle.keys() != self._residents.keys() - references.keys():
            raise RuntimeError("the idle residents are not those without a lease")
        if not self._leases.issuperset(self._pins.values()):
            raise RuntimeError("a pinned adapter has no lease")

    def _allocate(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        group = next(group for group in GROUPS if group.name == name)
        layers, pages, outputs = self.shape.num_layers, self.num_pages[name], self.shape.group_outputs(group)
        a = (layers, pages, len(outputs) * PAGE_RANK, self.shape.group_input(group))
        b = (layers, pages, PAGE_RANK, sum(outputs))
        return (
            torch.zeros(a, device=self.device, dtype=self.dtype),
            torch.zeros(b, device=self.device, dtype=self.dtype),
        )

    def _learn(self, digests: Iterable[str], load: Load) -> dict[str, AdapterWeights]:
        """Load the adapters whose size is not known, and remember it."""
        loaded = {digest: load(digest) for digest in digests if digest not in self._ranks}
        self._ranks |= {digest: weights.group_ranks for digest, weights in loaded.items()}
        return loaded

    def _needed(self, mix: Mix, missing: Sequence[str]) -> dict[str, int]:
        """Pages to allocate per group name, for the residents of `mix` that are `missing`."""
        if mix.composition is not Composition.FUSION:
            mix = Mix(tuple((key, 1.0) for key in missing))
        return pages_needed(mix, self._ranks)

    def _wanted(self, mix: Mix, loaded: Mapping[str, AdapterWeights]) -> Mapping[str, AdapterWeights]:
        """What is to be written, by resident key."""
        if mix.composition is not Composition.FUSION:
            return loaded
        return {mix.digest: fuse([(loaded[digest], weight) for digest, weight in mix.entries], self.dtype)}

    def _choose_victims(self, needed: Mapping[str, int], keep: Sequence[str]) -> list[str] | None:
        """The idle residents to evict, oldest first and no more than it takes, or None if it cannot be done."""
        short = {name: count - len(self._free[name]) for name, count in needed.items()}
        victims: list[str] = []
        for key in self._idle:
            pages = self._owned([key])
            if key not in keep and any(short[name] > 0 for name in pages):
                victims.append(key)
                short = {name: count - pages[name] for name, count in short.items()}
        if any(count > 0 for count in short.values()):
            return None
        for key in reversed(victims[:]):  # a later victim may have made an earlier one unnecessary
            pages = self._owned([key])
            if all(short[name] + pages[name] <= 0 for name in pages):
                victims.remove(key)
                short = {name: count + pages[name] for name, count in short.items()}
        return victims

    def _owned(self, keys: Iterable[str]) -> Counter[str]:
        """Pages per group name that the residents `keys` own together."""
        owned: Counter[str] = Counter()
        for key in keys:
            owned.update({name: len(pages) for name, pages in self._residents[key].pages.items()})
        return owned

    def _evict(self, key: str) -> None:
        del self._idle[key]
        for name, pages in self._residents.pop(key).pages.items():
            for page in pages:
                heapq.heappush(self._free[name], page)
        self.counters.evictions += 1

    def _write(self, key: str, groups: Mapping[str, PackedGroup]) -> None:
        """Copy an adapter into free pages, behind the launched steps: these may still read what was evicted."""
        resident = _Resident({}, {}, {})
        for name, packed in groups.items():
            pages = tuple(heapq.heappop(self._free[name]) for _ in range(packed.a.shape[1]))
            index = self._upload(torch.tensor(pages))
            for pool, source in zip(self.tensors[name], (packed.a, packed.b), strict=True):
                pool.index_copy_(1, index, self._upload(source))
            resident.pages[name] = pages
            resident.scales[name] = packed.scale
            resident.ranks[name] = packed.ranks
        self._residents[key] = resident
        self._idle[key] = None
        self.counters.loads += 1

    def _lease(self, mix: Mix, keys: Sequence[str]) -> PageLease:
        weights_of = {mix.digest: 1.0} if mix.composition is Composition.FUSION else dict(mix.entries)
        pages: dict[str, tuple[int, ...]] = dict.fromkeys(self.num_pages, ())
        weights: dict[str, tuple[float, ...]] = dict.fromkeys(self.num_pages, ())
        ranks: dict[str, tuple[int, ...]] = dict.fromkeys(self.num_pages, ())
        for key in keys:
            resident = self._residents[key]
            resident.references += 1
            self._idle.pop(key, None)
            for name, own in resident.pages.items():
                pages[name] += own
                weights[name] += (weights_of[key] * resident.scales[name],) * len(own)
                ranks[name] += resident.ranks[name]
        lease = PageLease(mix, pages, weights, ranks, tuple(keys))
        self._leases.add(lease)
        return lease


def _keys(mix: Mix) -> tuple[str, ...]:
    """The residents that serve a mix: its adapters, or the one synthetic adapter of a fusion."""
    return (mix.digest,) if mix.composition is Composition.FUSION else mix.digests
