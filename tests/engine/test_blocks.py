"""The block pool against a model made of dicts, and its promises one by one."""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from server.engine.blocks import BlockPool, chain_hash

SIZE = 2
NUM_BLOCKS = 7


@dataclass(eq=False)
class Holder:
    """What a sequence holds: its blocks, and how many of them it knows to be named, up to `parent`."""

    key: bytes
    tokens: list[int]
    blocks: list[int]
    parent: bytes
    named: int = 0
    released: bool = False

    def prefix(self, block: int) -> tuple[bytes, tuple[int, ...]]:
        return self.key, tuple(self.tokens[: (block + 1) * SIZE])


class PoolMachine(RuleBasedStateMachine):
    """Sequences over two token values start, publish their blocks in order, and end, in any interleaving.

    The model knows for every indexed block the whole prefix that it stands for, and the order in which free blocks
    became evictable.
    """

    holders = Bundle("holders")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, SIZE)
        self.references: Counter[int] = Counter()
        self.index: dict[tuple[bytes, tuple[int, ...]], int] = {}
        self.evictable: list[int] = []

    @rule(
        target=holders,
        key=st.sampled_from([b"", b"a", b"b"]),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10),
    )
    def start(self, key: bytes, tokens: list[int]) -> Holder:
        holder = Holder(key, tokens, [], key)
        expected: list[int] = []
        for block in range((len(tokens) - 1) // SIZE):
            if holder.prefix(block) not in self.index:
                break
            expected.append(self.index[holder.prefix(block)])
        matched, holder.parent = self.pool.match(tokens, key)
        assert matched == expected
        self._hold(matched)

        count = self.pool.blocks_for(len(tokens)) - len(matched)
        empty = NUM_BLOCKS - len(self.evictable) - len(+self.references)
        fresh = self.pool.allocate(count)
        if count > empty + len(self.evictable):
            assert fresh is None
            self._release(matched)
            holder.released = True
            return holder
        assert fresh is not None
        assert len(set(fresh)) == count
        assert not any(self.references[block] for block in fresh)
        evicted = self.evictable[: max(0, count - empty)]
        assert [block for block in fresh if block in self.evictable] == evicted, "not the least recently used first"
        self.evictable = self.evictable[len(evicted) :]
        self.index = {prefix: block for prefix, block in self.index.items() if block not in evicted}
        self._hold(fresh)
        holder.blocks = matched + fresh
        holder.named = len(matched)
        return holder

    @rule(holder=holders, count=st.integers(1, 5))
    def publish(self, holder: Holder, count: int) -> None:
        full = 0 if holder.released else len(holder.tokens) // SIZE
        for block in range(holder.named, min(full, holder.named + count)):
            tokens = holder.tokens[block * SIZE : (block + 1) * SIZE]
            holder.parent = self.pool.publish(holder.blocks[block], tokens, holder.parent)
            self.index.setdefault(holder.prefix(block), holder.blocks[block])
            holder.named += 1

    @rule(holder=consumes(holders))
    def finish(self, holder: Holder) -> None:
        if not holder.released:
            self._release(holder.blocks)

    @rule(holder=consumes(holders))
    def double_release_is_refused(self, holder: Holder) -> None:
        if holder.released:
            return
        self._release(holder.blocks)
        own = holder.blocks[-1]  # never shared: the last token's block is not taken from the cache
        if not self.references[own]:
            with pytest.raises(ValueError, match="not held"):
                self.pool.release([own])

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check_integrity()
        assert self.pool.references() == dict(+self.references)
        assert self.pool.num_used == len(+self.references)
        assert self.pool.num_free == NUM_BLOCKS - self.pool.num_used

    def _hold(self, blocks: list[int]) -> None:
        for block in blocks:
            self.references[block] += 1
            if block in self.evictable:
                self.evictable.remove(block)

    def _release(self, blocks: list[int]) -> None:
        self.pool.release(blocks)
        for block in reversed(blocks):
            self.references[block] -= 1
            if not self.references[block] and block in self.index.values():
                self.evictable.append(block)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=70, stateful_step_count=40, deadline=None)


def fill(pool: BlockPool, tokens: list[int], key: bytes = b"") -> list[int]:
    """Hold and publish all full blocks of `tokens`, as a sequence does that computed them."""
    blocks, parent = pool.match(tokens, key)
    start = len(blocks)
    fresh = pool.allocate(pool.blocks_for(len(tokens)) - start)
    assert fresh is not None
    blocks += fresh
    for block in range(start, len(tokens) // pool.block_size):
        piece = tokens[block * pool.block_size : (block + 1) * pool.block_size]
        parent = pool.publish(blocks[block], piece, parent)
    return blocks


def test_the_last_token_is_never_matched() -> None:
    pool = BlockPool(8, 4)
    tokens = list(range(8))  # exactly two blocks
    blocks = fill(pool, tokens)
    assert pool.match(tokens, b"")[0] == blocks[:1]
    assert pool.match([*tokens, 9], b"")[0] == blocks


def test_blocks_of_another_key_are_not_matched() -> None:
    pool = BlockPool(8, 4)
    tokens = list(range(9))
    blocks = fill(pool, tokens, b"one")
    assert pool.match(tokens, b"two") == ([], b"two")
    assert pool.match(tokens, b"one")[0] == blocks[:2]


def test_a_block_after_another_prefix_is_not_matched() -> None:
    pool = BlockPool(8, 2)
    fill(pool, [1, 2, 5, 6, 0])
    assert pool.match([3, 4, 5, 6, 0], b"")[0] == []


def test_a_hash_collision_does_not_serve_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.blocks.chain_hash", lambda *_: b"always the same")
    pool = BlockPool(4, 2)
    (block,) = fill(pool, [1, 2])
    assert pool.match([3, 4, 5], b"")[0] == []
    assert pool.match([1, 2, 5], b"")[0] == [block]


def test_the_tail_of_a_prefix_is_evicted_before_its_head() -> None:
    pool = BlockPool(4, 2)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    blocks = fill(pool, tokens)
    pool.release(blocks)
    assert pool.allocate(2) == [blocks[3], blocks[2]]
    assert pool.match([*tokens, 9], b"")[0] == blocks[:2]


def test_a_match_makes_a_prefix_recent() -> None:
    pool = BlockPool(2, 2)
    old, young = fill(pool, [1, 1]), fill(pool, [2, 2])
    pool.release(old)
    pool.release(young)
    pool.release(pool.match([1, 1, 0], b"")[0])
    assert pool.allocate(1) == young
    assert pool.match([1, 1, 0], b"")[0] == old


def test_the_second_of_two_equal_blocks_stays_private() -> None:
    pool = BlockPool(4, 2)
    fresh = pool.allocate(2)
    assert fresh is not None
    first, second = fresh
    assert pool.publish(first, [1, 2], b"") == pool.publish(second, [1, 2], b"")
    pool.release([second])
    assert pool.match([1, 2, 3], b"")[0] == [first]
    assert pool.num_used == 1
    pool.check_integrity()


def test_without_prefix_cache_nothing_is_kept() -> None:
    pool = BlockPool(4, 2, prefix_cache=False)
    pool.release(fill(pool, [1, 2, 3, 4]))
    assert pool.match([1, 2, 3], b"key") == ([], b"key")
    pool.check_integrity()


def test_a_refused_allocation_changes_nothing() -> None:
    pool = BlockPool(3, 2)
    cached = fill(pool, [1, 2])
    pool.release(cached)
    held = pool.allocate(1)
    assert pool.allocate(3) is None
    assert pool.match([1, 2, 3], b"")[0] == cached
    assert pool.num_used == 2
    assert held != cached


def test_release_counts_every_reference() -> None:
    pool = BlockPool(4, 2)
    blocks = fill(pool, [1, 2])
    assert pool.match([1, 2, 3], b"")[0] == blocks
    pool.release(blocks)
    assert pool.num_used == 1
    pool.release(blocks)
    assert pool.num_used == 0
    with pytest.raises(ValueError, match="not held"):
        pool.release(blocks)


def test_publishing_what_is_not_held_or_not_full_is_refused() -> None:
    pool = BlockPool(2, 2)
    with pytest.raises(ValueError, match="not held"):
        pool.publish(0, [1, 2], b"")
    fresh = pool.allocate(1)
    assert fresh is not None
    with pytest.raises(ValueError, match="not full"):
        pool.publish(fresh[0], [1], b"")


def test_the_hash_depends_on_parent_and_on_every_token() -> None:
    names = {
        chain_hash(parent, tokens)
        for parent in (b"", b"a", b"ab")
        for tokens in ([1, 2], [2, 1], [1, 258], [1 << 40, 2], [1, 2, 3])
    }
    assert len(names) == 15
    assert chain_hash(b"a", [1, 2]) == chain_hash(b"a", (1, 2))


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0)])
def test_an_empty_pool_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(num_blocks, block_size)


def test_check_integrity_notices_a_wrong_index() -> None:
    pool = BlockPool(2, 2)
    fill(pool, [1, 2])
    pool._index.clear()
    with pytest.raises(AssertionError, match="index"):
        pool.check_integrity()


def test_unpublished_blocks_are_not_found_again_and_their_other_holder_keeps_them() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.publish(blocks[1], (3, 4), pool.publish(blocks[0], (1, 2), b"key"))
    other, _ = pool.match([1, 2, 9], b"key")
    assert other == blocks[:1]
    pool.unpublish(blocks)
    pool.check_integrity()
    assert pool.match([1, 2, 3, 4, 5], b"key") == ([], b"key")
    pool.release(blocks)
    assert pool.references() == {blocks[0]: 1}
    pool.release(other)
    pool.check_integrity()
    assert pool.num_free == 4
