"""Adapters of several engines: where pins and prefetches go, and where adapters are."""

from scripted_pool import Engines


async def test_pins_spread_and_come_back_to_where_they_are() -> None:
    engines = Engines()
    for digest in ("a", "b", "c"):
        assert await engines.pool.pin(digest, "p")
    assert sorted(len(member.pinned) for member in engines.members) == [1, 2]
    assert await engines.pool.pin("a", "moved")
    assert [member.pinned["a"] for member in engines.members if "a" in member.pinned] == ["moved"]
    assert await engines.pool.pin("d", "p")
    assert not await engines.pool.pin("e", "p")  # no engine has room
    engines.pool.unpin("a")
    engines.pool.unpin("never")
    assert await engines.pool.pin("e", "p")
    assert [len(member.pinned) for member in engines.members] == [2, 2]


async def test_a_pin_goes_where_the_adapter_is() -> None:
    engines = Engines(3)
    engines.members[2].move("a", "device")
    assert await engines.pool.pin("a", "p")
    assert "a" in engines.members[2].pinned


async def test_prefetches_are_shared_out_and_evictions_reach_all() -> None:
    engines = Engines(3)
    engines.pool.prefetch(dict.fromkeys("abcdefg", "p"))
    assert [sorted(member.ahead) for member in engines.members] == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
    engines.members[2].move("x", "host")
    assert await engines.pool.prefetch_now("x", "p") == "device"
    assert engines.members[2].prefetched == ["x"]
    engines.pool.evict("x")
    assert [member.evicted for member in engines.members] == [["x"]] * 3


async def test_residency_is_the_nearest_tier_of_any_engine() -> None:
    engines = Engines()
    told: list[tuple[str, str]] = []
    engines.pool.on_residency = lambda digest, tier: told.append((digest, tier))
    first, second = engines.members
    first.move("a", "host")
    second.move("a", "device")
    first.move("a", "device")
    second.move("a", "host")
    first.move("a", "disk")
    second.move("a", "disk")
    first.move("b", "disk")  # it had never been elsewhere
    assert told == [("a", "host"), ("a", "device"), ("a", "host"), ("a", "disk")]
    assert not engines.pool._tiers
