"""Device memory for adapters: rank pages per target group, taken by whole mixes and kept until others need them."""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from adapters_store.page_lease import PageLease, Reservation
from adapters_store.pages import allocate_pages, page_ranks, pages_needed, rank_pages
from adapters_store.residents import Resident, State, choose_victims, resident_keys
from adapters_store.types import GROUPS, Composition, LinearShape, Mix

Ranks = Mapping[str, Mapping[str, int]]
"""`AdapterWeights.group_ranks` by digest."""


@dataclass(frozen=True)
class Shortage:
    """A group whose pages do not suffice: how many are needed, there are, and belong to pins of other adapters."""

    group: str
    needed: int
    pages: int
    pinned: int


@dataclass
class PoolCounters:
    """Residents written to and dropped from the device since the start."""

    loads: int = 0
    evictions: int = 0


class PagePool:
    """A fixed number of rank pages per target group, with reference counts and least-recently-used eviction.

    A mix's pages are had in two ways: `acquire` where all its adapters are loaded, else `reserve`, then `fill` or
    `fail` for each that is missing, `settle`, and `acquire` again. What is being loaded belongs to nobody and cannot be
    evicted; once it is there, it is a resident like all others. The pool itself copies nothing.

    `num_pages` is the number of pages of every group, or one by group name. `tensors[group]` is the pair
    a (layers, pages, S * 16, in), b (layers, pages, 16, sum(out)) that the kernels read, zero at first.
    Free pages are given out lowest id first, so that residents lie together. `moved` collects the keys that became
    loaded or went, for whoever reports them. Not thread-safe.
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
            group.name: allocate_pages(shape, group, num_pages[group.name], device, dtype) for group in GROUPS
        }
        self.counters = PoolCounters()
        self.moved: set[str] = set()
        self._free = {name: list(range(count)) for name, count in self.num_pages.items()}
        self._residents: dict[str, Resident] = {}
        self._idle: dict[str, None] = {}  # loaded, unreferenced and not pinned, the least recently used first
        self._holders: set[PageLease | Reservation] = set()
        self._pins: dict[str, Mapping[str, int]] = {}  # pages by group name, whether they are resident yet or not
        self._leaving: set[str] = set()

    @property
    def num_bytes(self) -> int:
        """Device memory of the pages, in bytes; equal to `page_bytes` times pages, summed over the groups."""
        return sum(a.nbytes + b.nbytes for a, b in self.tensors.values())

    @property
    def residents(self) -> tuple[str, ...]:
        """Digests of the adapters, and of the materialised fusions, that are loaded."""
        return tuple(key for key in self._residents if self.is_loaded(key))

    def is_loaded(self, key: str) -> bool:
        resident = self._residents.get(key)
        return resident is not None and resident.state is State.LOADED

    def holds(self, mix: Mix) -> bool:
        """Whether `mix` could be acquired at once."""
        return all(map(self.is_loaded, resident_keys(mix)))

    def fits(self, mix: Mix, ranks: Ranks) -> bool:
        """Whether `mix` could be acquired if only pins held pages."""
        return self.shortage((mix,), ranks) is None

    def shortage(self, mixes: Iterable[Mix], ranks: Ranks) -> Shortage | None:
        """Where the pages of all these mixes at once, which share adapters, are too many beside the pins."""
        sizes: dict[str, Mapping[str, int]] = {}
        for mix in mixes:
            if mix.composition is Composition.FUSION:
                sizes[mix.digest] = pages_needed(mix, ranks)
            else:
                sizes.update((digest, rank_pages(ranks[digest])) for digest in mix.digests)
        needed: Counter[str] = Counter()
        for own in sizes.values():
            needed.update(own)
        pinned = self._pinned(without=sizes)
        for name, count in self.num_pages.items():
            if needed[name] + pinned[name] > count:
                return Shortage(name, needed[name], count, pinned[name])
        return None

    def acquire(self, mix: Mix) -> PageLease | None:
        """All pages of `mix`, safe from eviction until released, or None unless all its adapters are loaded."""
        if not self.holds(mix):
            return None
        residents = {key: self._residents[key] for key in resident_keys(mix)}
        lease = PageLease.of(mix, residents, self.num_pages)
        self._hold(lease)
        return lease

    def release(self, lease: PageLease) -> None:
        """Give a lease back; its adapters stay until their pages are needed. Raises RuntimeError the second time."""
        if lease.released or lease not in self._holders:
            raise RuntimeError(f"lease of mix {lease.mix.digest[:12]} is released already or not of this pool")
        lease.released = True
        self._let_go(lease)

    def reserve(self, mix: Mix, ranks: Ranks, *, evict: bool = True) -> Reservation | None:
        """Pages for all that `mix` lacks, evicting idle residents if need be and `evict`; None if they cannot be had.

        None changes nothing. Those that are on their way already are shared.
        """
        keys = resident_keys(mix)
        missing = tuple(key for key in keys if key not in self._residents)
        fused = mix.composition is Composition.FUSION
        needed = self._needed(mix, missing, ranks)
        victims = self._victims(keys, needed)
        if victims is None or (victims and not evict):
            return None
        for key in victims:
            self.counters.evictions += 1
            self._drop(key)
        for key in missing:
            own = {name: max(ranks[d].get(name, 0) for d in mix.digests) for name in needed} if fused else ranks[key]
            self._place(key, own)
        reservation = Reservation(mix, keys, missing)
        self._hold(reservation)
        return reservation

    def can_reserve(self, mix: Mix, ranks: Ranks) -> bool:
        """Whether `reserve` would succeed now."""
        keys = resident_keys(mix)
        missing = tuple(key for key in keys if key not in self._residents)
        return self._victims(keys, self._needed(mix, missing, ranks)) is not None

    def settle(self, reservation: Reservation) -> None:
        """End a reservation; what failed gives its pages back. Raises RuntimeError the second time."""
        if reservation not in self._holders:
            raise RuntimeError(f"reservation of mix {reservation.mix.digest[:12]} is settled already")
        self._let_go(reservation)

    def pages_of(self, key: str) -> Mapping[str, tuple[int, ...]]:
        """Page ids of a resident by group name."""
        return self._residents[key].pages

    def fill(self, key: str, scales: Mapping[str, float]) -> None:
        """The pages of `key` are written; its scales by group name."""
        resident = self._loading(key)
        resident.scales, resident.state = scales, State.LOADED
        self.counters.loads += 1
        self.moved.add(key)
        self._rest(key)

    def fail(self, key: str) -> None:
        """The pages of `key` will not be written; they are free once every reservation of it has been settled."""
        self._loading(key).state = State.FAILED
        self._rest(key)

    def pin(self, digest: str, ranks: Mapping[str, int]) -> bool:
        """Keep an adapter on the device, once it is there, until `unpin`; it counts in `fits` from now on.

        `ranks` by group name. False if pins would own more than half of the pages of some group. Loading it is up to
        the caller.
        """
        sizes, pinned = rank_pages(ranks), self._pinned(without=(digest,))
        if any(pinned[name] + sizes.get(name, 0) > count // 2 for name, count in self.num_pages.items()):
            return False
        self._pins[digest] = sizes
        self._idle.pop(digest, None)
        self._leaving.discard(digest)
        return True

    def unpin(self, digest: str) -> None:
        """Undo `pin`, if there was one."""
        if self._pins.pop(digest, None) is not None and digest in self._residents:
            self._rest(digest)

    def evict(self, key: str) -> None:
        """Drop a resident as soon as nothing uses it, unless it is asked for again before. A pin of it ends."""
        self._pins.pop(key, None)
        if key in self._residents:
            self._leaving.add(key)
            self._rest(key)

    def pages_by_state(self) -> dict[str, int]:
        """Pages over all groups that are `free`, `used` (leased, pinned, being loaded) or `cached` (may be evicted)."""
        free = sum(len(pages) for pages in self._free.values())
        cached = sum(sum(self._residents[key].sizes.values()) for key in self._idle)
        return {"free": free, "used": sum(self.num_pages.values()) - free - cached, "cached": cached}

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every page has exactly one owner and the counts equal leases and reservations."""
        for name, count in self.num_pages.items():
            owned = [page for resident in self._residents.values() for page in resident.pages.get(name, ())]
            if sorted(owned + self._free[name]) != list(range(count)):
                raise RuntimeError(f"pages of group {name}: owned {sorted(owned)}, free {sorted(self._free[name])}")
        references = Counter(key for holder in self._holders for key in holder.keys)
        if references != +Counter({key: resident.references for key, resident in self._residents.items()}):
            raise RuntimeError(f"residents' reference counts differ from the leases': {references}")
        if self._idle.keys() != set(self.residents) - references.keys() - self._pins.keys():
            raise RuntimeError("the idle residents are not those that nothing holds")
        if not self._leaving <= self._residents.keys() - self._idle.keys() - self._pins.keys():
            raise RuntimeError("a resident that was to leave is still there")
        failed = {key for key, resident in self._residents.items() if resident.state is State.FAILED}
        if not failed <= references.keys():
            raise RuntimeError("what could not be loaded keeps its pages")

    def _needed(self, mix: Mix, missing: tuple[str, ...], ranks: Ranks) -> dict[str, int]:
        """Pages by group name of the residents of `mix` that are missing."""
        if mix.composition is not Composition.FUSION:
            mix = Mix(tuple((key, 1.0) for key in missing))
        return pages_needed(mix, ranks) if missing else {}

    def _victims(self, keys: tuple[str, ...], needed: Mapping[str, int]) -> list[str] | None:
        """The residents, other than `keys`, to evict for so many pages by group name, or None if that is not enough."""
        short = {name: count - len(self._free[name]) for name, count in needed.items()}
        idle = ((key, self._residents[key].sizes) for key in self._idle if key not in keys)
        return choose_victims(idle, short)

    def _place(self, key: str, ranks: Mapping[str, int]) -> None:
        """Give a new resident its pages."""
        by_page = {name: page_ranks(rank) for name, rank in ranks.items() if rank}
        pages = {name: tuple(heapq.heappop(self._free[name]) for _ in own) for name, own in by_page.items()}
        self._residents[key] = Resident(pages, by_page)

    def _drop(self, key: str) -> None:
        resident = self._residents.pop(key)
        for name, pages in resident.pages.items():
            for page in pages:
                heapq.heappush(self._free[name], page)
        self._idle.pop(key, None)
        self._leaving.discard(key)
        self.moved.add(key)

    def _hold(self, holder: PageLease | Reservation) -> None:
        self._holders.add(holder)
        for key in holder.keys:
            self._residents[key].references += 1
            self._idle.pop(key, None)
            self._leaving.discard(key)

    def _let_go(self, holder: PageLease | Reservation) -> None:
        self._holders.remove(holder)
        for key in holder.keys:
            self._residents[key].references -= 1
            self._rest(key)

    def _rest(self, key: str) -> None:
        """Find the place of a resident whose state or holders changed."""
        resident = self._residents[key]
        if resident.references or resident.state is State.LOADING:
            return
        if resident.state is State.FAILED or key in self._leaving:
            self.counters.evictions += resident.state is State.LOADED
            self._drop(key)
        elif key not in self._pins:
            self._idle[key] = None

    def _loading(self, key: str) -> Resident:
        resident = self._residents[key]
        if resident.state is not State.LOADING:
            raise RuntimeError(f"resident {key[:12]} is {resident.state.name.lower()}, expected one being loaded")
        return resident

    def _pinned(self, without: Iterable[str]) -> Counter[str]:
        """Pages that pins own by group name."""
        pinned: Counter[str] = Counter()
        for key, sizes in self._pins.items():
            if key not in without:
                pinned.update(sizes)
        return pinned
