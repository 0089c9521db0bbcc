"""Which sequences run in the next step, and how many of their tokens.

Every step takes the running sequences in order of admission, then admits waiting ones, under one budget of tokens:
decode rows and chunks of prompts share each forward pass. When KV blocks run out, the sequence admitted last is
preempted and will be recomputed. This file knows no tensors.

Steps are launched (`advance`) and later committed; the next one may be scheduled in between, with the tokens that are
not known yet counted as pending.

Rank pages cannot deadlock: the pages of a mix are acquired all at once or not at all, waiting and preempted sequences
hold none, and a sequence whose pages stay missing for `STARVATION_STEPS` steps stops the admission of all others until
the running ones have given back what it needs.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from adapters_store.pool import PageLease
from server.engine.blocks import BlockPool
from server.engine.fairness import OUTPUT_PRICE, FairQueue
from server.engine.sequence import Request, Sequence

STARVATION_STEPS = 64
# Free blocks that admission leaves to each running sequence for its growth. 256 requests of 8..512 prompt and output
# tokens, 64 rows, KV for 20,000 tokens: 43 preemptions and 140,000 token rows, against 161 and 158,000 with none left.
GROWTH_BLOCKS = 0.5
MISSING_MIXES = 64  # mixes tried in vain in one step; each costs a look at all residents that could make room


class AdapterPages(Protocol):
    """Device pages of adapters, as the scheduler sees them."""

    def acquire(self, request: Request) -> PageLease | None:
        """All pages of the request's mix, or None when they cannot be had now.

        Raises ValueError (as AdapterError is one) when they never can, as for an adapter that cannot be read.
        """
        ...

    def release(self, lease: PageLease) -> None: ...


@dataclass(frozen=True)
class Chunk:
    """Tokens start .. start + num_tokens of a sequence, its next uncomputed ones.

    `samples`: the chunk reaches the end of the sequence, so that its last row yields a token.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool

    @classmethod
    def of(cls, sequence: Sequence, num_tokens: int) -> "Chunk":
        start = sequence.num_computed
        return cls(sequence, start, num_tokens, start + num_tokens == len(sequence))

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens


@dataclass
class Plan:
    """One step: chunks of one token first, then longer ones; and sequences that can never be admitted, with the reason.

    The failed ones are still queued: whoever runs the plan ends them by `Scheduler.remove`.
    """

    chunks: list[Chunk] = field(default_factory=list)
    failed: list[tuple[Sequence, str]] = field(default_factory=list)


class Scheduler:
    """Continuous batching with chunked prefill, prefix sharing, preemption by recompute, and fairness to tenants."""

    def __init__(
        self,
        blocks: BlockPool,
        pages: AdapterPages,
        *,
        max_num_seqs: int,
        max_batch_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        if max_batch_tokens < max_num_seqs:
            raise ValueError(f"max_batch_tokens ({max_batch_tokens}) must be at least max_num_seqs ({max_num_seqs})")
        self.blocks = blocks
        self.pages = pages
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.clock = clock
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.push(sequence)

    def schedule(self) -> Plan:
        plan = Plan()
        preempted = self.preemptions
        budget = self._continue_running(plan, self.max_batch_tokens)
        if self.preemptions == preempted:
            self._admit(plan, budget)
        plan.chunks.sort(key=lambda chunk: chunk.num_tokens > 1)
        return plan

    def advance(self, chunk: Chunk) -> None:
        """Record that a chunk has been launched; the next step may be scheduled behind it."""
        chunk.sequence.num_computed += chunk.num_tokens
        chunk.sequence.num_pending += chunk.samples

    def commit(self, chunk: Chunk, token: int | None) -> None:
        """Record that a launched chunk of a sequence that has not ended is done, and the token that it yielded."""
        sequence = chunk.sequence
        if token is not None:
            sequence.num_pending -= 1
            sequence.tokens.append(token)
            self.waiting.charge(sequence, 1, OUTPUT_PRICE)
        self._publish(sequence)

    def remove(self, sequence: Sequence, *, forget: bool = False) -> None:
        """End a sequence, running or waiting, and take back all it holds.

        forget: its blocks hold what must not be reused, as after an overflow, and leave the prefix cache.
        """
        if forget:
            self.blocks.unpublish(sequence.blocks)
        if sequence in self.running:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)

    def check_integrity(self) -> None:
        """Raise AssertionError unless exactly the running sequences hold blocks and pages, each as many as it needs."""
        self.blocks.check_integrity()
        for sequence in self.running:
            assert len(sequence.blocks) >= self.blocks.blocks_for(sequence.num_computed), "a sequence lacks blocks"
            assert (sequence.lease is not None) == bool(sequence.request.mix.entries), "a running sequence lacks pages"
        held = Counter(block for sequence in self.running for block in sequence.blocks)
        assert held == self.blocks.references(), "blocks are held by no running sequence, or not as often as counted"
        assert not any(sequence.blocks or sequence.lease for sequence in self.waiting), "a waiting one holds memory"

    def _continue_running(self, plan: Plan, budget: int) -> int:
        """A chunk for every running sequence.

        Nothing is admitted behind a prompt that takes more than the rest of the budget, so only the last sequence can
        be within its prompt: a long one never takes the rows of those that decode.
        """
        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            index += 1
            if not sequence.ready:
                continue
            count = min(sequence.num_uncomputed, budget)
            if self._grow(sequence, sequence.num_computed + count):
                plan.chunks.append(Chunk.of(sequence, count))
                budget -= count
        return budget

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence blocks for `num_tokens`, preempting the last admitted; False if that was itself."""
        missing = self.blocks.blocks_for(num_tokens) - len(sequence.blocks)
        while missing > 0:
            taken = self.blocks.allocate(missing)
            if taken is not None:
                sequence.blocks += taken
                break
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.waiting.push_front(sequence)
        self._leave(sequence)
        sequence.forget_computed()
        self.preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.waiting.stopped(sequence)
        self.blocks.release(sequence.blocks)
        sequence.blocks = []
        self._release_pages(sequence)

    def _release_pages(self, sequence: Sequence) -> None:
        if sequence.lease is not None:
            self.pages.release(sequence.lease)
            sequence.lease = None

    def _admit(self, plan: Plan, budget: int) -> None:
        if budget <= 0 or len(self.running) >= self.max_num_seqs:
            return
        starving = [sequence for sequence in self.waiting if sequence.skipped_steps >= STARVATION_STEPS]
        turn = [min(starving, key=lambda sequence: sequence.arrival)] if starving else self.waiting.in_turn()
        missing: set[str] = set()
        for sequence in turn:
            if sequence.num_pending:  # preempted while a step was under way
                continue
            if not self._acquire_pages(sequence, plan, missing):
                continue
            if not self._take_blocks(sequence):
                self._release_pages(sequence)
                return  # KV is common to all: letting smaller requests overtake would starve this one
            budget -= self._start(sequence, plan, budget)
            if budget <= 0 or len(self.running) >= self.max_num_seqs:
                return

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Hold the cached prefix and fresh blocks for all the other tokens."""
        cached, root = self.blocks.match(sequence.tokens, sequence.request.cache_key)
        missing = self.blocks.blocks_for(len(sequence)) - len(cached)
        growth = int(GROWTH_BLOCKS * len(self.running))
        fresh = self.blocks.allocate(missing) if missing + growth <= self.blocks.num_free else None
        if fresh is None:
            self.blocks.release(cached)
            return False
        sequence.blocks = cached + fresh
        sequence.num_computed = len(cached) * self.blocks.block_size
        sequence.num_hashed_blocks, sequence.parent_hash = len(cached), root
        self.blocks.count(len(sequence), sequence.num_computed)
        return True

    def _start(self, sequence: Sequence, plan: Plan, budget: int) -> int:
        sequence.skipped_steps = 0
        if sequence.first_scheduled is None:
            sequence.first_scheduled = self.clock()
            sequence.num_cached = sequence.num_computed
        self.waiting.started(sequence)
        self.running.append(sequence)
        count = min(sequence.num_uncomputed, budget)
        plan.chunks.append(Chunk.of(sequence, count))
        return count

    def _acquire_pages(self, sequence: Sequence, plan: Plan, missing: set[str]) -> bool:
        """`missing`: digests of mixes that could not be had in this step, and still cannot, as admissions only take."""
        mix = sequence.request.mix
        if not mix.entries:
            return True
        if mix.digest not in missing:
            if len(missing) >= MISSING_MIXES:
                return False
            try:
                sequence.lease = self.pages.acquire(sequence.request)
            except ValueError as error:
                plan.failed.append((sequence, str(error)))
                return False
            if sequence.lease is not None:
                return True
            missing.add(mix.digest)
        sequence.skipped_steps += 1
        return False

    def _publish(self, sequence: Sequence) -> None:
        """Enter full blocks into the prefix index.

        A block may still be under way in a launched step: whoever reads it runs behind that step.
        """
        size = self.blocks.block_size
        known = min(sequence.num_computed, len(sequence.tokens))
        while (sequence.num_hashed_blocks + 1) * size <= known:
            start = sequence.num_hashed_blocks * size
            block, tokens = sequence.blocks[sequence.num_hashed_blocks], sequence.tokens[start : start + size]
            sequence.parent_hash = self.blocks.publish(block, tokens, sequence.parent_hash)
            sequence.num_hashed_blocks += 1
