"""The page pool: which pages are taken, who makes room, and that nothing half done is left."""

import pytest
import torch

from adapters_store.page_lease import PageLease
from adapters_store.pool import PagePool
from adapters_store.types import Composition, Mix
from tests.adapters_store.library import (
    CPU,
    LIBRARY,
    RANKS,
    SHAPE,
    acquire,
    check_content,
    make_pool,
    single,
    write,
)

QKV_ONLY = {digest: {"qkv": rank} for digest, rank in (("s", 16), ("l", 48), ("n", 40), *((d, 16) for d in "abcdef"))}


def touch(pool: PagePool, digest: str, ranks: dict[str, dict[str, int]]) -> PageLease:
    """Lease an adapter of which only the size matters."""
    reservation = pool.reserve(single(digest), ranks)
    assert reservation is not None
    for key in reservation.missing:
        pool.fill(key, dict.fromkeys(ranks[key], 1.0))
    pool.settle(reservation)
    lease = pool.acquire(single(digest))
    assert lease is not None
    return lease


def test_lowest_pages_first_and_shared_between_mixes() -> None:
    pool = make_pool(8)
    one = acquire(pool, Mix((("00", 0.5), ("01", 0.25))))
    two = acquire(pool, Mix((("01", 1.0), ("03", 2.0))))
    assert one is not None
    assert two is not None
    assert one.pages == {"qkv": (0, 1), "o": (0, 1), "gate_up": (0, 1), "down": (0, 1)}
    assert two.pages == {"qkv": (1, 2), "o": (1,), "gate_up": (1,), "down": (1,)}
    assert one.weights["qkv"] == (0.5, 0.25)
    assert two.weights["qkv"] == (1.0, 2.0 * 0.25)
    assert one.ranks["qkv"] == (4, 16)
    assert pool.counters.loads == 3
    pool.release(one)
    assert pool.pages_by_state() == {"free": 32 - 4 - 4 - 1, "used": 5, "cached": 4}
    pool.release(two)
    assert pool.pages_by_state() == {"free": 23, "used": 0, "cached": 9}
    pool.check_integrity()


def test_least_recently_used_goes_first() -> None:
    """Use counts from its end: what was released last is evicted last."""
    pool = make_pool(3)

    def use(*digests: str) -> None:
        for lease in reversed([touch(pool, digest, QKV_ONLY) for digest in digests]):
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
    pool = make_pool(2)
    ranks = {"q": {"qkv": 16}, "o": {"o": 16}, "new": {"o": 32}}
    for digest in ranks:
        pool.release(touch(pool, digest, ranks))
    assert pool.residents == ("q", "new")


def test_only_as_many_victims_as_it_takes() -> None:
    """The oldest resident is too small; the next one alone is enough, so that the oldest stays."""
    pool = make_pool(4)
    for digest in "sl":
        pool.release(touch(pool, digest, QKV_ONLY))
    touch(pool, "n", QKV_ONLY)
    assert pool.residents == ("s", "n")


def test_free_pages_can_be_asked_for_alone() -> None:
    pool = make_pool(3)
    pool.release(touch(pool, "l", QKV_ONLY))
    assert pool.reserve(single("a"), QKV_ONLY, evict=False) is None
    assert pool.residents == ("l",)
    assert pool.reserve(single("a"), QKV_ONLY) is not None
    assert pool.residents == ()


def test_what_is_being_loaded_is_nobodys_victim_and_shared_by_all_who_ask() -> None:
    pool = make_pool(2)
    one = pool.reserve(single("a"), QKV_ONLY)
    both = pool.reserve(Mix((("a", 1.0), ("b", 1.0))), QKV_ONLY)
    assert one is not None
    assert both is not None
    assert (one.missing, both.missing) == (("a",), ("b",))
    assert pool.reserve(single("c"), QKV_ONLY) is None
    assert pool.acquire(single("a")) is None
    assert pool.residents == ()
    assert pool.pages_by_state() == {"free": 6, "used": 2, "cached": 0}
    pool.fill("a", {"qkv": 1.0})
    pool.settle(one)
    assert pool.reserve(single("c"), QKV_ONLY) is None, "the other reservation still needs it"
    pool.fill("b", {"qkv": 1.0})
    pool.settle(both)
    assert pool.pages_by_state() == {"free": 6, "used": 0, "cached": 2}
    assert pool.reserve(single("c"), QKV_ONLY) is not None
    pool.check_integrity()


def test_a_load_that_fails_gives_its_pages_back_and_no_others() -> None:
    pool = make_pool(3)
    mix = Mix((("00", 1.0), ("01", 1.0), ("03", 1.0)))
    held = acquire(pool, single("01"))
    assert held is not None
    reservation = pool.reserve(mix, RANKS)
    assert reservation is not None
    write(pool, mix, "00")
    pool.fail("03")
    pool.settle(reservation)
    assert set(pool.residents) == {"00", "01"}
    assert pool.pages_by_state() == {"free": 4, "used": 4, "cached": 4}
    pool.check_integrity()
    check_content(pool, held)
    lease = acquire(pool, mix)
    assert lease is not None
    check_content(pool, lease)


def test_what_goes_on_loading_after_its_reservation_ends_becomes_idle() -> None:
    pool = make_pool(1)
    reservation = pool.reserve(single("a"), QKV_ONLY)
    assert reservation is not None
    pool.settle(reservation)
    assert pool.reserve(single("b"), QKV_ONLY) is None, "its pages are being written"
    pool.fill("a", {"qkv": 1.0})
    assert pool.residents == ("a",)
    with pytest.raises(RuntimeError, match="is loaded, expected one being loaded"):
        pool.fail("a")
    assert pool.reserve(single("b"), QKV_ONLY) is not None


def test_an_evicted_adapter_leaves_when_nothing_uses_it() -> None:
    pool = make_pool(3)
    lease = touch(pool, "a", QKV_ONLY)
    pool.evict("a")
    pool.evict("unknown")
    assert pool.residents == ("a",)
    pool.moved.clear()
    pool.release(lease)
    assert pool.residents == ()
    assert pool.moved == {"a"}
    assert pool.counters.evictions == 1
    lease = touch(pool, "a", QKV_ONLY)
    pool.evict("a")
    again = touch(pool, "a", QKV_ONLY)  # it is asked for again before it left
    pool.release(lease)
    pool.release(again)
    assert pool.residents == ("a",)
    pool.evict("a")
    assert pool.residents == ()
    pool.check_integrity()


def test_fusion_is_resident_under_its_own_digest() -> None:
    pool = make_pool(3)
    mix = Mix.of([("00", 1.0), ("02", 3.0)], Composition.FUSION)
    lease = acquire(pool, mix)
    assert lease is not None
    assert pool.residents == (mix.digest,)
    assert lease.pages["qkv"] == (0, 1, 2)
    assert lease.weights["qkv"] == (1.0, 1.0, 1.0)
    assert lease.ranks["qkv"] == (16, 16, 8)
    check_content(pool, lease)
    again = acquire(pool, mix)
    assert again is not None
    assert again.pages == lease.pages
    assert pool.counters.loads == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_have_the_pools_dtype(dtype: torch.dtype) -> None:
    pool = PagePool(SHAPE, 2, CPU, dtype)
    assert all(not a.any() and not b.any() for a, b in pool.tensors.values())
    assert acquire(pool, single("00")) is not None
    a, _ = pool.tensors["down"]
    assert a.dtype == dtype
    assert torch.equal(a[1, 0, :4], LIBRARY["00"].pairs[1, "down_proj"].a.to(dtype))


def test_the_base_model_needs_nothing() -> None:
    pool = make_pool(1)
    lease = acquire(pool, Mix())
    assert lease is not None
    assert set(lease.pages.values()) == {()} == set(lease.weights.values())
    assert pool.fits(Mix(), {})
    pool.release(lease)


def test_pins() -> None:
    pool = make_pool(6)
    lease = acquire(pool, single("00"))
    assert lease is not None
    pool.release(lease)
    assert pool.pin("00", RANKS["00"])
    assert pool.pin("00", RANKS["00"])
    assert not pool.pin("04", RANKS["04"])  # three pages more would be four of six
    assert pool.pin("01", RANKS["01"])
    assert pool.pages_by_state() == {"free": 20, "used": 4, "cached": 0}
    triple = Mix((("02", 1.0), ("04", 1.0)))
    assert not pool.fits(triple, RANKS), "what is pinned counts before it is there"
    assert acquire(pool, single("01")) is not None
    assert pool.reserve(triple, RANKS) is None
    pool.unpin("00")
    pool.unpin("01")
    pool.unpin("00")
    assert pool.fits(triple, RANKS)
    pool.check_integrity()


def test_eviction_ends_a_pin() -> None:
    pool = make_pool(4)
    pool.release(touch(pool, "a", QKV_ONLY))
    assert pool.pin("a", QKV_ONLY["a"])
    pool.evict("a")
    assert pool.residents == ()
    assert pool.pin("l", {"qkv": 32}), "the pin is gone"
    pool.check_integrity()


@pytest.mark.parametrize("num_pages", [0, {"qkv": 1}, {"qkv": 1, "o": 1, "gate_up": 1, "down": 0}])
def test_bad_page_numbers(num_pages: dict[str, int] | int) -> None:
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(SHAPE, num_pages, CPU, torch.float32)


def test_integrity_notices_damage() -> None:
    pool = make_pool(2)
    assert acquire(pool, single("00")) is not None
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
    lease = acquire(one, single("00"))
    assert lease is not None
    with pytest.raises(RuntimeError, match="not of this pool"):
        other.release(lease)
    one.release(lease)
