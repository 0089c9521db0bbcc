"""The page pool under everything that can happen to it, in any order."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adapters_store.page_lease import PageLease, Reservation
from adapters_store.pages import pages_needed, rank_pages
from adapters_store.residents import resident_keys
from adapters_store.types import GROUPS, Composition, Mix
from tests.adapters_store.library import LIBRARY, MIXES, RANKS, acquire, check_content, make_pool, write

DIGESTS = st.sampled_from(sorted(LIBRARY))


class PoolMachine(RuleBasedStateMachine):
    """Leases, reservations, loads that end or fail in any order, pins and evictions.

    What a lease promises is checked after every step.
    """

    @initialize(sizes=st.lists(st.integers(2, 9), min_size=4, max_size=4))
    def start(self, sizes: list[int]) -> None:
        self.pool = make_pool(dict(zip((group.name for group in GROUPS), sizes, strict=True)))
        self.leases: list[PageLease] = []
        self.reservations: list[Reservation] = []
        self.loading: dict[str, Mix] = {}
        self.pinned: set[str] = set()

    def used(self) -> set[str]:
        """Residents that nobody can evict."""
        held = {key for holder in (*self.leases, *self.reservations) for key in holder.keys}
        return (held | self.pinned | self.loading.keys()) & set(self.pool._residents)

    def available(self, keep: set[str]) -> dict[str, int]:
        """Pages per group that could be had by somebody who keeps these residents."""
        held = [self.pool._residents[key].sizes for key in self.used() | keep & self.pool._residents.keys()]
        return {name: count - sum(own.get(name, 0) for own in held) for name, count in self.pool.num_pages.items()}

    @rule(mix=MIXES)
    def acquire(self, mix: Mix) -> None:
        lease = self.pool.acquire(mix)
        assert (lease is not None) == (set(resident_keys(mix)) <= set(self.pool.residents))
        if lease is not None:
            self.leases.append(lease)

    @rule(mix=MIXES, evict=st.booleans())
    def reserve(self, mix: Mix, evict: bool) -> None:
        pool, keys = self.pool, set(resident_keys(mix))
        before = {key: dict(resident.pages) for key, resident in pool._residents.items()}
        states, evictions = pool.pages_by_state(), pool.counters.evictions
        free = {name: len(ids) for name, ids in pool._free.items()}
        rest = mix
        if mix.composition is not Composition.FUSION or mix.digest in before:
            rest = Mix(tuple((key, 1.0) for key in keys - before.keys()))
        needed, available = pages_needed(rest, RANKS), self.available(keys)
        reservation = pool.reserve(mix, RANKS, evict=evict)
        room = available if evict else free
        assert (reservation is not None) == all(needed[name] <= max(0, room[name]) for name in needed)
        if reservation is None:
            assert {key: dict(resident.pages) for key, resident in pool._residents.items()} == before
            assert (pool.pages_by_state(), pool.counters.evictions) == (states, evictions)
            return
        evicted = [key for key in before if key not in pool._residents]
        assert evict or not evicted
        assert pool.counters.evictions == evictions + len(evicted)
        assert set(reservation.missing) == keys - before.keys()
        for spared in evicted:  # without any one of the victims it would not have fitted
            gained = {
                name: free[name] + sum(len(before[key].get(name, ())) for key in evicted if key != spared)
                for name in free
            }
            assert any(needed[name] > gained[name] for name in needed)
        self.reservations.append(reservation)
        self.loading |= dict.fromkeys(reservation.missing, mix)

    @rule(data=st.data(), fails=st.booleans())
    def finish(self, data: st.DataObject, fails: bool) -> None:
        """One of the residents under way comes, or does not."""
        if not self.loading:
            return
        key = data.draw(st.sampled_from(sorted(self.loading)))
        mix = self.loading.pop(key)
        if not fails:
            write(self.pool, mix, key)
            return
        self.pool.fail(key)
        for reservation in [own for own in self.reservations if key in own.keys]:
            self.reservations.remove(reservation)
            self.pool.settle(reservation)
        assert key not in self.pool._residents

    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        """Even before all of it is loaded, as when another part has failed."""
        if self.reservations:
            reservation = self.reservations.pop(data.draw(st.integers(0, len(self.reservations) - 1)))
            self.pool.settle(reservation)
            with pytest.raises(RuntimeError, match="settled already"):
                self.pool.settle(reservation)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.leases:
            lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
            self.pool.release(lease)
            assert lease.released
            with pytest.raises(RuntimeError, match="released already"):
                self.pool.release(lease)

    @rule(digest=DIGESTS)
    def pin(self, digest: str) -> None:
        sizes = [rank_pages(RANKS[own]) for own in self.pinned | {digest}]
        room = {name: count // 2 for name, count in self.pool.num_pages.items()}
        expected = all(sum(own.get(name, 0) for own in sizes) <= most for name, most in room.items())
        assert self.pool.pin(digest, RANKS[digest]) == expected
        if expected:
            self.pinned.add(digest)

    @rule(digest=DIGESTS)
    def unpin(self, digest: str) -> None:
        self.pinned.discard(digest)
        self.pool.unpin(digest)

    @rule(digest=DIGESTS)
    def evict(self, digest: str) -> None:
        self.pinned.discard(digest)
        self.pool.evict(digest)
        assert digest in self.used() or digest not in self.pool._residents

    @rule(mix=MIXES)
    def fits_means_that_it_can_be_had(self, mix: Mix) -> None:
        while self.loading:
            key, own = self.loading.popitem()
            write(self.pool, own, key)
        while self.reservations:
            self.pool.settle(self.reservations.pop())
        while self.leases:
            self.pool.release(self.leases.pop())
        missing = self.pinned - set(self.pool.residents)
        lease = None if missing else acquire(self.pool, mix)  # a pin whose adapter is not there yet has room reserved
        if not missing:
            assert self.pool.fits(mix, RANKS) == (lease is not None)
        if lease is not None:
            self.leases.append(lease)

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        pool.check_integrity()
        for lease in self.leases:
            check_content(pool, lease)
        for name, count in pool.num_pages.items():
            assert sum(rank_pages(RANKS[digest]).get(name, 0) for digest in self.pinned) <= count // 2
        assert self.loading.keys() == pool._residents.keys() - set(pool.residents)
        assert sum(pool.pages_by_state().values()) == sum(pool.num_pages.values())
        idle = set(pool.residents) - self.used()
        assert pool.pages_by_state()["cached"] == sum(sum(pool._residents[key].sizes.values()) for key in idle)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)
