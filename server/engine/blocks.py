"""KV blocks: who holds which, and which full blocks can be shared by prefix.

This file knows ids, reference counts and hashes, and no tensors. A full block is named by a hash chained over the
tokens of all blocks before it and rooted at the request's `cache_key`, so that the KV of one adapter mix is never read
under another. Blocks that nobody holds keep their content until they are needed again, least recently used first.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from itertools import chain


@dataclass(slots=True)
class _Block:
    references: int = 0
    hash: bytes | None = None
    tokens: tuple[int, ...] = ()


def chain_hash(parent: bytes, tokens: Tokens[int]) -> bytes:
    """Name of the block that holds `tokens` (a whole block of them) after the blocks that `parent` names."""
    return hashlib.blake2b(array("q", tokens).tobytes(), key=hashlib.sha256(parent).digest(), digest_size=16).digest()


class BlockPool:
    """A fixed number of KV blocks with reference counts and a prefix index.

    Every block is in exactly one state: free without content, free but cached (found by its hash), or held.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a block pool needs at least one block of one token, got {num_blocks} x {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.queries = 0
        self.hits = 0
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # free but cached, least recently used first
        self._index: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out now, cached ones included."""
        return len(self._empty) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, tokens: Tokens[int], root: bytes, most: int | None = None) -> tuple[list[int], bytes]:
        """The longest cached prefix of `tokens`, of at most `most` of them, and the hash of its last block.

        The blocks are held for the caller. At least the last token is left out, since its logits must be computed.
        """
        held: list[int] = []
        if not self.prefix_cache:
            return held, root
        size = self.block_size
        full = min(len(tokens) - 1, len(tokens) if most is None else most) // size
        for start in range(0, full * size, size):
            piece = tuple(tokens[start : start + size])
            name = chain_hash(root, piece)
            block = self._index.get(name)
            if block is None or self._blocks[block].tokens != piece:
                break
            self._hold(block)
            held.append(block)
            root = name
        return held, root

    def count(self, queried: int, hit: int) -> None:
        """Account one admission: `queried` tokens asked for, `hit` of them found."""
        self.queries += queried
        self.hits += hit

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks without content, held once each; None, and nothing changed, when there are not so many."""
        if count > self.num_free:
            return None
        taken = []
        for _ in range(count):
            block = self._empty.pop() if self._empty else self._evict()
            self._blocks[block].references = 1
            taken.append(block)
        return taken

    def publish(self, block: int, tokens: Tokens[int], parent: bytes) -> bytes:
        """Enter a held, fully computed block into the prefix index; returns its hash.

        When another block of the same content is indexed already, that one stays the shared one. Raises ValueError for
        a block that is not held or not full.
        """
        state = self._blocks[block]
        if not state.references or len(tokens) != self.block_size:
            raise ValueError(f"block {block} with {len(tokens)} tokens is published but not held, or not full")
        name = chain_hash(parent, tokens)
        if self.prefix_cache and name not in self._index:
            self._index[name] = block
            state.hash, state.tokens = name, tuple(tokens)
        return name

    def unpublish(self, blocks: list[int]) -> None:
        """Take held blocks out of the prefix index: nobody else shall find what they hold."""
        for block in blocks:
            state = self._blocks[block]
            if state.hash is not None:
                del self._index[state.hash]
                state.hash, state.tokens = None, ()

    def release(self, blocks: list[int]) -> None:
        """Give back one reference of each. The tail of a prefix is evicted before its head."""
        for block in reversed(blocks):
            state = self._blocks[block]
            if state.references < 1:
                raise ValueError(f"block {block} is released but not held")
            state.references -= 1
            if not state.references:
                if state.hash is None:
                    self._empty.append(block)
                else:
                    self._cached[block] = None

    def freed_by(self, holders: Iterable[list[int]]) -> int:
        """Blocks that would be free if these holders gave theirs back: those that nobody else holds."""
        given = Counter(chain.from_iterable(holders))
        return sum(self._blocks[block].references == count for block, count in given.items())

    def references(self) -> dict[int, int]:
        """How often each held block is held."""
        return {block: state.references for block, state in enumerate(self._blocks) if state.references}

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is in exactly one state and the index tells the truth."""
        empty, cached = set(self._empty), set(self._cached)
        held = set(self.references())
        assert len(empty) == len(self._empty), "a block is empty twice"
        assert not (empty & cached) | (empty & held) | (cached & held), "a block is in two states"
        assert len(empty) + len(cached) + len(held) == self.num_blocks, "a block is lost"
        assert all(state.references >= 0 for state in self._blocks), "a block has negative references"
        assert all(self._blocks[i].hash is None for i in empty), "an empty block has a hash"
        indexed = {i: state.hash for i, state in enumerate(self._blocks) if state.hash is not None}
        assert {block: name for name, block in self._index.items()} == indexed, "the prefix index is wrong"

    def _hold(self, block: int) -> None:
        self._blocks[block].references += 1
        self._cached.pop(block, None)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        state = self._blocks[block]
        assert state.hash is not None
        del self._index[state.hash]
        state.hash, state.tokens = None, ()
        return block
