"""The page pool: nothing is lost, everything that is leased is there, and the mathematics is the mix's."""

import itertools
import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adapters_store.pages import pages_needed, rank_pages
from adapters_store.pool import PageLease, PagePool
from adapters_store.types import GROUPS, PAGE_RANK, TARGETS, AdapterWeights, Composition, LinearShape, LoraPair, Mix

HIDDEN, KEYS, FEED = 6, 3, 5
INPUTS = dict.fromkeys(TARGETS, HIDDEN) | {"down_proj": FEED}
OUTPUTS = dict.fromkeys(TARGETS, HIDDEN) | {"k_proj": KEYS, "v_proj": KEYS, "gate_proj": FEED, "up_proj": FEED}
SHAPE = LinearShape(2, INPUTS, OUTPUTS)
CPU = torch.device("cpu")


def adapter(
    digest: str,
    rank: int | tuple[int, ...],
    targets: tuple[str, ...] = TARGETS,
    scales: tuple[float, ...] = (1.0,),
    seed: int = 0,
) -> AdapterWeights:
    """Random weights; ranks and scales go round over layers and targets."""
    generator = torch.Generator().manual_seed(seed)
    modules = list(itertools.product(range(SHAPE.num_layers), targets))
    ranks = itertools.cycle(rank if isinstance(rank, tuple) else (rank,))
    pairs = {}
    for (layer, target), r, scale in zip(modules, ranks, itertools.cycle(scales), strict=False):
        a = torch.randn(r, INPUTS[target], generator=generator, dtype=torch.float64)
        b = torch.randn(OUTPUTS[target], r, generator=generator, dtype=torch.float64)
        pairs[layer, target] = LoraPair(a, b, scale)
    return AdapterWeights(digest, pairs)


def library() -> dict[str, AdapterWeights]:
    """Adapters of one to three pages a group, whole and partial, with one scale and with several."""
    draw = random.Random(0)
    made = [
        adapter("00", 4),
        adapter("01", (16, 9)),
        adapter("02", (3, 40, 17), scales=(0.5, 2.0)),
        adapter("03", 8, ("q_proj", "v_proj"), (0.25,)),
        adapter("04", 33, ("k_proj",)),
        adapter("05", (20, 1), ("down_proj", "up_proj"), (-1.0,)),
        adapter("06", 16, ("o_proj", "gate_proj"), (3.0, 0.0)),
        *(
            adapter(f"{n:02}", draw.randint(1, 48), tuple(draw.sample(TARGETS, 3)), (draw.random(),), n)
            for n in range(7, 12)
        ),
    ]
    return {weights.digest: weights for weights in made}


LIBRARY = library()
RANKS = {digest: weights.group_ranks for digest, weights in LIBRARY.items()}


def expected_delta(mix: Mix, layer: int, target: str) -> tuple[torch.Tensor, float]:
    """The (out, in) matrix that the mix adds to a linear, from its definition, and the size of what cancels in it."""
    pairs = [(LIBRARY[d].pairs[layer, target], w) for d, w in mix.entries if (layer, target) in LIBRARY[d].pairs]
    if mix.composition is not Composition.FUSION:
        zero = torch.zeros(OUTPUTS[target], INPUTS[target], dtype=torch.float64)
        return sum((w * pair.scale * pair.b @ pair.a for pair, w in pairs), zero), 1.0
    rank = max((pair.rank for pair, _ in pairs), default=0)
    a = torch.zeros(rank, INPUTS[target], dtype=torch.float64)
    b = torch.zeros(OUTPUTS[target], rank, dtype=torch.float64)
    for pair, w in pairs:
        a += w * torch.nn.functional.pad(pair.a, (0, 0, 0, rank - pair.rank))
        b += w * pair.scale * torch.nn.functional.pad(pair.b, (0, rank - pair.rank))
    largest = sum(abs(w) for _, w in pairs) ** 2 * rank
    return b @ a, max(1.0, largest)


def leased_delta(pool: PagePool, lease: PageLease, layer: int, target: str) -> torch.Tensor:
    """The same matrix from the lease's pages and weights, as the kernels use them."""
    group = next(group for group in GROUPS if target in group.targets)
    outputs = SHAPE.group_outputs(group)
    place = group.targets.index(target)
    a, b = pool.tensors[group.name]
    pages = list(lease.pages[group.name])
    rows = a[layer, pages, place * PAGE_RANK : (place + 1) * PAGE_RANK]
    columns = b[layer, pages, :, sum(outputs[:place]) : sum(outputs[: place + 1])]
    weights = torch.tensor(lease.weights[group.name], dtype=a.dtype)
    return torch.einsum("p,pro,pri->oi", weights, columns, rows)


def check_content(pool: PagePool, lease: PageLease) -> None:
    for layer, target in itertools.product(range(SHAPE.num_layers), TARGETS):
        expected, size = expected_delta(lease.mix, layer, target)
        torch.testing.assert_close(leased_delta(pool, lease, layer, target), expected, rtol=1e-5, atol=1e-5 * size)


def make_pool(num_pages: dict[str, int] | int, dtype: torch.dtype = torch.float64) -> PagePool:
    """A pool whose pages hold NaN at first, so that what is not written shows."""
    pool = PagePool(SHAPE, num_pages, CPU, dtype)
    for a, b in pool.tensors.values():
        a.fill_(torch.nan)
        b.fill_(torch.nan)
    return pool


def single(digest: str) -> Mix:
    return Mix(((digest, 1.0),))


WEIGHTS = st.sampled_from([1.0, 0.5, -0.75, 0.125, 2.0])
ENTRIES = st.lists(st.tuples(st.sampled_from(sorted(LIBRARY)), WEIGHTS), max_size=4)
MIXES = st.builds(Mix.of, ENTRIES) | st.builds(
    Mix.of,
    ENTRIES.filter(lambda entries: sum(weight for _, weight in entries) != 0),
    st.just(Composition.FUSION),
)


class PoolMachine(RuleBasedStateMachine):
    """Random acquires, releases, pins; what a lease promises is checked after every step."""

    @initialize(sizes=st.lists(st.integers(2, 9), min_size=4, max_size=4))
    def start(self, sizes: list[int]) -> None:
        self.pool = make_pool(dict(zip((group.name for group in GROUPS), sizes, strict=True)))
        self.leases: list[PageLease] = []
        self.pinned: set[str] = set()

    def free_or_idle(self, keep: set[str]) -> dict[str, int]:
        """Pages per group that could be had: everything but what is leased, pinned, or kept."""
        used = set(self.pinned).union(*(lease.keys for lease in self.leases)) | keep
        residents = self.pool._residents
        held = {key: residents[key].pages for key in used if key in residents}
        return {
            name: count - sum(len(pages.get(name, ())) for pages in held.values())
            for name, count in self.pool.num_pages.items()
        }

    @rule(mix=MIXES)
    def acquire(self, mix: Mix) -> None:
        pool = self.pool
        before, states, counters = pool.residents, pool.pages_by_state(), (pool.counters.loads, pool.counters.evictions)
        pages = {key: dict(pool._residents[key].pages) for key in before}
        free = {name: len(ids) for name, ids in pool._free.items()}
        keys = {mix.digest} if mix.composition is Composition.FUSION else set(mix.digests)
        rest = Mix() if mix.digest in before else mix
        if mix.composition is not Composition.FUSION:
            rest = Mix(tuple(entry for entry in mix.entries if entry[0] not in before))
        needed, available = pages_needed(rest, RANKS), self.free_or_idle(keys)
        lease = pool.acquire(mix, LIBRARY.__getitem__)
        assert (lease is not None) == all(needed[name] <= available[name] for name in needed)
        if lease is None:
            assert pool.residents == before
            assert pool.pages_by_state() == states
            assert (pool.counters.loads, pool.counters.evictions) == counters
            assert {key: dict(pool._residents[key].pages) for key in before} == pages
            return
        assert pool.fits(mix, RANKS)
        evicted = [key for key in before if key not in pool.residents]
        assert pool.counters.evictions == counters[1] + len(evicted)
        assert pool.counters.loads == counters[0] + len(keys - set(before))
        for spared in evicted:  # without any one of the victims it would not have fitted
            gained = {
                name: free[name] + sum(len(pages[key].get(name, ())) for key in evicted if key != spared)
                for name in free
            }
            assert any(needed[name] > gained[name] for name in needed)
        self.leases.append(lease)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.leases:
            lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
            self.pool.release(lease)
            assert lease.released
            with pytest.raises(RuntimeError, match="released already"):
                self.pool.release(lease)

    @rule(digest=st.sampled_from(sorted(LIBRARY)))
    def pin(self, digest: str) -> None:
        if self.pool.pin(digest, LIBRARY.__getitem__):
            self.pinned.add(digest)
        else:
            assert digest not in self.pinned

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        if self.pinned:
            digest = data.draw(st.sampled_from(sorted(self.pinned)))
            self.pinned.remove(digest)
            self.pool.unpin(digest)

    @rule(mix=MIXES)
    def fits_means_that_it_can_be_had(self, mix: Mix) -> None:
        while self.leases:
            self.pool.release(self.leases.pop())
        fits = self.pool.fits(mix, RANKS)
        self.acquire(mix)
        assert fits == bool(self.leases)

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity()
        for lease in self.leases:
            check_content(self.pool, lease)
        for name, count in self.pool.num_pages.items():
            assert sum(rank_pages(RANKS[digest]).get(name, 0) for digest in self.pinned) <= count // 2
        assert self.pinned <= set(self.pool.residents)
        assert sum(self.pool.pages_by_state().values()) == sum(self.pool.num_pages.values())


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_lowest_pages_first_and_shared_between_mixes() -> None:
    pool = make_pool(8)
    one = pool.acquire(Mix((("00", 0.5), ("01", 0.25))), LIBRARY.__getitem__)
    two = pool.acquire(Mix((("01", 1.0), ("03", 2.0))), LIBRARY.__getitem__)
    assert one is not None
    assert two is not None
    assert one.pages == {"qkv": (0, 1), "o": (0, 1), "gate_up": (0, 1), "down": (0, 1)}
    assert two.pages == {"qkv": (1, 2), "o": (1,), "gate_up": (1,), "down": (1,)}
    assert one.weights["qkv"] == (0.5, 0.25)
    assert two.weights["qkv"] == (1.0, 2.0 * 0.25)
    assert pool.counters.loads == 3
    pool.release(one)
    assert pool.pages_by_state() == {"free": 32 - 4 - 4 - 1, "used": 5, "cached": 4}
    pool.release(two)
    assert pool.pages_by_state() == {"free": 23, "used": 0, "cached": 9}
    pool.check_integrity()


def test_least_recently_used_goes_first() -> None:
    """Use counts from its end: what was released last is evicted last."""
    weights = {digest: adapter(digest, 16, ("q_proj",)) for digest in "abcdef"}
    pool = make_pool(3)

    def use(*digests: str) -> None:
        leases = [pool.acquire(single(digest), weights.__getitem__) for digest in digests]
        for lease in reversed(leases):
            assert lease is not None
            pool.release(lease)

    use("a", "b", "c")  # released c, b, a
    use("c")
    use("d")
    assert set(pool.residents) == {"a", "c", "d"}
    use("e")
    assert set(pool.residents) == {"c", "d", "e"}
    use("f")
    assert set(pool.residents) == {"d", "e", "f"}
    assert pool.counters.evictions == 3


def test_what_owns_no_page_of_the_short_group_is_no_victim() -> None:
    weights = {
        "q": adapter("q", 16, ("q_proj",)),
        "o": adapter("o", 16, ("o_proj",)),
        "new": adapter("new", 32, ("o_proj",)),
    }
    pool = make_pool(2)
    for digest in ("q", "o", "new"):
        lease = pool.acquire(single(digest), weights.__getitem__)
        assert lease is not None
        pool.release(lease)
    assert pool.residents == ("q", "new")


def test_only_as_many_victims_as_it_takes() -> None:
    """The oldest resident is too small; the next one alone is enough, so that the oldest stays."""
    small, large, new = (adapter(digest, rank, ("q_proj",)) for digest, rank in (("s", 16), ("l", 48), ("n", 40)))
    weights = {each.digest: each for each in (small, large, new)}
    pool = make_pool(4)
    for digest in ("s", "l"):
        lease = pool.acquire(single(digest), weights.__getitem__)
        assert lease is not None
        pool.release(lease)
    assert pool.acquire(single("n"), weights.__getitem__) is not None
    assert pool.residents == ("s", "n")


def test_nothing_is_loaded_that_does_not_fit() -> None:
    loaded: list[str] = []

    def load(digest: str) -> AdapterWeights:
        loaded.append(digest)
        return LIBRARY[digest]

    pool = make_pool(3)
    held = pool.acquire(single("00"), load)
    assert held is not None
    for _ in range(3):
        assert pool.acquire(single("04"), load) is None
        assert pool.acquire(Mix.of([("04", 1.0), ("00", 1.0)], Composition.FUSION), load) is None
    assert loaded == ["00", "04"]  # its size had to be learnt, once
    pool.release(held)
    assert pool.acquire(single("04"), load) is not None
    assert loaded == ["00", "04", "04"]


@pytest.mark.parametrize("composition", [Composition.MIXTURE, Composition.FUSION])
def test_a_failing_load_changes_nothing(composition: Composition) -> None:
    pool = make_pool(3)
    lease = pool.acquire(single("01"), LIBRARY.__getitem__)
    assert lease is not None
    pool.release(lease)

    def load(digest: str) -> AdapterWeights:
        if digest == "03":
            raise OSError("gone")
        return LIBRARY[digest]

    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            pool.acquire(Mix.of([("00", 1.0), ("03", 1.0)], composition), load)
        assert pool.residents == ("01",)
        assert pool.pages_by_state() == {"free": 8, "used": 0, "cached": 4}
        pool.check_integrity()


def test_fusion_is_resident_under_its_own_digest() -> None:
    pool = make_pool(3)
    mix = Mix.of([("00", 1.0), ("02", 3.0)], Composition.FUSION)
    lease = pool.acquire(mix, LIBRARY.__getitem__)
    assert lease is not None
    assert pool.residents == (mix.digest,)
    assert lease.pages["qkv"] == (0, 1, 2)
    assert lease.weights["qkv"] == (1.0, 1.0, 1.0)
    check_content(pool, lease)
    again = pool.acquire(mix, LIBRARY.__getitem__)
    assert again is not None
    assert again.pages == lease.pages
    assert pool.counters.loads == 1


def test_rewritten_pages_are_zero_where_unused() -> None:
    pool = make_pool(1)
    lease = pool.acquire(single("00"), LIBRARY.__getitem__)
    assert lease is not None
    pool.release(lease)
    weights = adapter("n", 3, ("k_proj", "up_proj"))
    assert pool.acquire(single("n"), {"n": weights}.__getitem__) is not None
    a, b = pool.tensors["qkv"]
    assert a.count_nonzero() == 2 * 3 * HIDDEN
    assert a[:, 0, 16:19].count_nonzero() == 2 * 3 * HIDDEN
    assert b.count_nonzero() == 2 * 3 * KEYS
    assert b[:, 0, :3, HIDDEN : HIDDEN + KEYS].count_nonzero() == 2 * 3 * KEYS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_have_the_pools_dtype(dtype: torch.dtype) -> None:
    pool = PagePool(SHAPE, 2, CPU, dtype)
    assert all(not a.any() and not b.any() for a, b in pool.tensors.values())
    assert pool.acquire(single("00"), LIBRARY.__getitem__) is not None
    a, _ = pool.tensors["down"]
    assert a.dtype == dtype
    assert torch.equal(a[1, 0, :4], LIBRARY["00"].pairs[1, "down_proj"].a.to(dtype))


def test_the_base_model_needs_nothing() -> None:
    pool = make_pool(1)
    lease = pool.acquire(Mix(), LIBRARY.__getitem__)
    assert lease is not None
    assert set(lease.pages.values()) == {()} == set(lease.weights.values())
    assert pool.fits(Mix(), {})
    pool.release(lease)


def test_pins() -> None:
    pool = make_pool(6)
    assert pool.pin("00", LIBRARY.__getitem__)
    assert pool.pin("00", LIBRARY.__getitem__)
    assert not pool.pin("04", LIBRARY.__getitem__)  # three pages more would be four of six
    assert pool.pin("01", LIBRARY.__getitem__)
    assert pool.pages_by_state() == {"free": 16, "used": 8, "cached": 0}
    triple = Mix((("02", 1.0), ("04", 1.0)))
    assert not pool.fits(triple, RANKS)
    assert pool.acquire(triple, LIBRARY.__getitem__) is None
    pool.unpin("00")
    pool.unpin("01")
    assert pool.fits(triple, RANKS)
    assert pool.acquire(triple, LIBRARY.__getitem__) is not None
    with pytest.raises(KeyError):
        pool.unpin("00")
    pool.check_integrity()


@pytest.mark.parametrize("num_pages", [0, {"qkv": 1}, {"qkv": 1, "o": 1, "gate_up": 1, "down": 0}])
def test_bad_page_numbers(num_pages: dict[str, int] | int) -> None:
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(SHAPE, num_pages, CPU, torch.float32)


def test_integrity_notices_damage() -> None:
    pool = make_pool(2)
    lease = pool.acquire(single("00"), LIBRARY.__getitem__)
    assert lease is not None
    pool._free["qkv"].append(0)
    with pytest.raises(RuntimeError, match="qkv"):
        pool.check_integrity()
    pool._free["qkv"].remove(0)
    pool._residents["00"].references += 1
    with pytest.raises(RuntimeError, match="reference"):
        pool.check_integrity()
    pool._residents["00"].references -= 1
    pool._idle["00"] = None
    with pytest.raises(RuntimeError, match="idle"):
        pool.check_integrity()


def test_a_foreign_lease_is_refused() -> None:
    one, other = make_pool(2), make_pool(2)
    lease = one.acquire(single("00"), LIBRARY.__getitem__)
    assert lease is not None
    with pytest.raises(RuntimeError, match="not of this pool"):
        other.release(lease)
    one.release(lease)
