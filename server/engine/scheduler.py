"""Which sequences run in the next step, and how many of their tokens.

Every step takes the running sequences in order of admission, then admits waiting ones, under one budget of tokens:
decode rows and chunks of prompts share each forward pass. When KV blocks run out, the sequence admitted last is
preempted and will be recomputed; so is one of a tenant that holds more than its share, for one that is owed service
(shares.py). This file knows no tensors.

Steps are launched (`advance`) and later committed; the next one may be scheduled in between, with the tokens that are
not known yet counted as pending.

Rank pages cannot deadlock: the pages of a mix are acquired all at once or not at all, waiting and preempted sequences
hold none, and a sequence whose pages stay missing keeps others off them when it is its turn (starvation.py).
"""

from collections import Counter
from collections.abc import Callable

from server.engine.blocks import BlockPool
from server.engine.config import RequestError
from server.engine.fairness import INPUT_PRICE, OUTPUT_PRICE, FairQueue
from server.engine.plan import Chunk, LayerRun, Plan
from server.engine.sequence import Sequence
from server.engine.shares import PATIENCE, QUANTUM, Shares
from server.engine.starvation import AdapterPages, Starvation

# Free blocks that admission leaves to each running sequence for its growth. 256 requests of 8..512 prompt and output
# tokens, 64 rows, KV for 20,000 tokens: 43 preemptions and 140,000 token rows, against 161 and 158,000 with none left.
GROWTH_BLOCKS = 0.5
CLAIMANTS = 4  # tenants that look for a row to take in one step; each costs a look at all that run


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
        patience: float = PATIENCE,
        quantum: int = QUANTUM,
    ) -> None:
        if max_batch_tokens < max_num_seqs:
            raise ValueError(f"max_batch_tokens ({max_batch_tokens}) must be at least max_num_seqs ({max_num_seqs})")
        self.blocks = blocks
        self.pages = pages
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.clock = clock
        self.waiting = FairQueue()
        self.shares = Shares(self.waiting, blocks, patience, quantum)
        self.starvation = Starvation(self.waiting, pages)
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.yielded = 0  # of the preemptions, those in favour of another tenant that waited

    def add(self, sequence: Sequence, *, first: bool = False) -> None:
        """Queue a sequence, `first`: ahead of its tenant's others."""
        if sequence.queued is None:
            sequence.queued = self.clock()
        if first:
            self.waiting.push_front(sequence)
        else:
            self.waiting.push(sequence)

    def schedule(self) -> Plan:
        plan = Plan(self.max_batch_tokens)
        preempted = self.preemptions
        self._continue_running(plan)
        if self.preemptions == preempted:
            self._admit(plan)
        plan.chunks.sort(key=lambda chunk: chunk.num_tokens > 1)
        return plan

    def advance(self, chunk: Chunk) -> None:
        """Record that a chunk has been launched; the next step may be scheduled behind it."""
        sequence = chunk.sequence
        sequence.num_computed += chunk.num_tokens
        sequence.num_pending += chunk.samples
        if chunk.scores:
            sequence.num_unscored = min(sequence.num_unscored, max(0, sequence.num_telling - chunk.stop))

    def retract(self, chunk: Chunk) -> None:
        """Record that a launched chunk does not yield its token after all; its last token will be computed again."""
        chunk.sequence.num_computed -= 1
        chunk.sequence.num_pending -= 1

    def advance_layers(self, layers: LayerRun) -> None:
        """Record that some layers of a prompt have been launched."""
        layers.sequence.layers_done += layers.count

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
            self.starvation.left(sequence)

    def restart(self, sequence: Sequence) -> None:
        """Take a sequence out whose prompt a router has read as rows of the base model: it will be added once more.

        Its tenant pays for both times.
        """
        self.waiting.charge(sequence, sequence.num_prompt, INPUT_PRICE)
        self.remove(sequence)
        sequence.forget_computed()

    def resume(self, sequence: Sequence) -> None:
        """A router has decided for a prompt while taking it through all layers.

        Its blocks hold what was computed as decided, and may be found now. The last token is computed once more, as a
        row like others, which yields the next one. Where it was preempted meanwhile there is nothing to keep.
        """
        if sequence not in self.running:
            return
        sequence.num_cached = 0
        sequence.num_computed = sequence.num_prompt - 1
        sequence.parent_hash = sequence.cache_root
        self._publish(sequence)

    def check_integrity(self) -> None:
        """Raise AssertionError unless exactly the running sequences hold blocks and pages, each as many as it needs."""
        self.blocks.check_integrity()
        for sequence in self.running:
            assert len(sequence.blocks) >= self.blocks.blocks_for(sequence.num_computed), "a sequence lacks blocks"
            assert (sequence.lease is not None) == bool(sequence.request.mix.entries), "a running sequence lacks pages"
        held = Counter(block for sequence in self.running for block in sequence.blocks)
        assert held == self.blocks.references(), "blocks are held by no running sequence, or not as often as counted"
        assert not any(sequence.blocks or sequence.lease for sequence in self.waiting), "a waiting one holds memory"
        starving = self.starvation.sequence
        assert starving is None or starving in set(self.waiting), "room is kept for a sequence that does not wait"

    def _continue_running(self, plan: Plan) -> None:
        """A chunk for every running sequence.

        Nothing is admitted behind a prompt that takes more than the rest of the budget, so only the last sequence can
        be within its prompt: a long one never takes the rows of those that decode.
        """
        preempted = self.preemptions
        for sequence in tuple(self.running):
            gone = self.preemptions > preempted and sequence not in self.running
            if not gone and sequence.ready and self._grow(sequence, plan):
                plan.run(sequence)

    def _grow(self, sequence: Sequence, plan: Plan) -> bool:
        """Give the sequence blocks for its next chunk, preempting others or itself; False if it was itself."""
        num_tokens = sequence.num_computed + min(sequence.num_uncomputed, plan.budget)
        missing = self.blocks.blocks_for(num_tokens) - len(sequence.blocks)
        while missing > 0:
            taken = self.blocks.allocate(missing)
            if taken is not None:
                sequence.blocks += taken
                break
            victim = self.shares.outgrown(self.running)
            self._preempt(victim, plan)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, plan: Plan) -> None:
        plan.drop(sequence)
        self.waiting.push_front(sequence)
        self._leave(sequence)
        sequence.forget_computed()
        sequence.preempted.append(self.clock())
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

    def _admit(self, plan: Plan) -> None:
        """Start waiting sequences in free rows, or in rows that other tenants owe them.

        A row that is taken gives its token back to the budget, unless the last sequence is within its prompt.
        """
        if plan.budget <= 0 and not (self._full and all(chunk.samples for chunk in plan.chunks)):
            return
        if self._full and not self.waiting.contended:
            return
        self._start_waiting(plan)
        self.starvation.settle(self.running, self.max_num_seqs - len(self.running))

    def _start_waiting(self, plan: Plan) -> None:
        for sequence in self.starvation.in_turn(plan):
            if self._full and (len(plan.passed) >= CLAIMANTS or not self.waiting.contended):
                return
            if sequence.num_pending or not sequence.ready:  # preempted while a step, or its mask, was under way
                continue
            if sequence.layered and any(other.num_layers_left for other in self.running):
                continue  # one at a time: each keeps the states of its whole prompt
            if self._full and self._victims(sequence, plan, missing=0) is None:
                plan.passed.add(sequence.request.tenant)
                continue
            if not self._acquire_pages(sequence, plan):
                continue
            if not self._take_blocks(sequence, plan):
                self._release_pages(sequence)
                if not self._full:
                    self.starvation.lacks_blocks(sequence)
                    return  # KV is common to all: letting smaller requests overtake would starve this one
                plan.passed.add(sequence.request.tenant)
                continue
            self._start(sequence, plan)
            if plan.budget <= 0:
                return

    @property
    def _full(self) -> bool:
        return len(self.running) >= self.max_num_seqs

    def _victims(self, sequence: Sequence, plan: Plan, missing: int) -> list[Sequence] | None:
        return self.shares.victims(sequence, self.running, plan.started, row=self._full, missing=missing)

    def _take_blocks(self, sequence: Sequence, plan: Plan) -> bool:
        """Hold the cached prefix and fresh blocks for all the other tokens, preempting whoever owes them or the row.

        Not where that leaves no token of the step for the sequence: a row that waits for its own token is in no step.
        The tenants of the preempted start nothing else, so that their next ones do not overtake them.
        """
        cached, root = self.blocks.match(sequence.tokens, sequence.cache_root, sequence.num_reusable)
        missing = self.blocks.blocks_for(len(sequence)) - len(cached)
        lacking = missing + int(GROWTH_BLOCKS * len(self.running)) - self.blocks.num_free
        victims: list[Sequence] | None = []
        if self._full or lacking > 0:
            victims = self._victims(sequence, plan, lacking)
        if victims is None or not plan.has_tokens_without(victims):
            self.blocks.release(cached)
            return False
        for victim in victims:
            self._preempt(victim, plan)
            self.yielded += 1
            plan.passed.add(victim.request.tenant)
        fresh = self.blocks.allocate(missing)
        assert fresh is not None, "fewer blocks are free than were counted"
        sequence.blocks = cached + fresh
        sequence.num_computed = len(cached) * self.blocks.block_size
        sequence.num_hashed_blocks, sequence.parent_hash = len(cached), root
        self.blocks.count(len(sequence), sequence.num_computed)
        return True

    def _start(self, sequence: Sequence, plan: Plan) -> None:
        sequence.skipped_steps = 0
        self.shares.started(sequence, again=sequence.first_scheduled is not None)
        if sequence.first_scheduled is None:
            sequence.first_scheduled = self.clock()
        if sequence.num_cached is None and not sequence.undecided:
            sequence.num_cached = sequence.num_computed
        self.waiting.started(sequence)
        self.running.append(sequence)
        self.starvation.left(sequence)
        plan.started.add(sequence.request.tenant)
        plan.run(sequence)

    def _acquire_pages(self, sequence: Sequence, plan: Plan) -> bool:
        mix = sequence.request.mix
        if not mix.entries:
            return True
        if mix.digest not in plan.missing:
            if not self.starvation.leaves_room(sequence):
                plan.miss(sequence)
                return False
            try:
                sequence.lease = self.pages.acquire(sequence.request)
            except RequestError as error:
                plan.failed.append((sequence, error))
                return False
            if sequence.lease is not None:
                return True
            if self.pages.is_loading(mix):
                return False  # it is nobody's fault, and takes pages from nobody who could have them
            plan.missing.add(mix.digest)  # and remains so in this step, as admissions only take
        plan.miss(sequence)
        self.starvation.missed(sequence)
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
