"""A scheduler driven as the engine drives it, under a model that is a hash.

The simulated KV cache remembers which prefix under which cache key each slot was written for, so that a block that is
shared wrongly, or written while another sequence reads it, is noticed at once.
"""

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

from adapters_store.page_lease import PageLease
from adapters_store.types import Mix
from server.engine.blocks import BlockPool
from server.engine.config import RequestError
from server.engine.plan import Chunk
from server.engine.scheduler import Scheduler
from server.engine.scoring import spans_to_score
from server.engine.sequence import Request, SamplingParams, Sequence
from server.engine.shares import PATIENCE, QUANTUM

VOCABULARY = 23
STOP = 0
SIZES = {"a": 1, "b": 1, "c": 2, "d": 3}
"""Rank pages by adapter digest."""


class FakePages:
    """Rank pages as mere numbers. Adapters that no lease uses can always be evicted."""

    def __init__(self, capacity: int, sizes: Mapping[str, int], broken: frozenset[str] = frozenset()) -> None:
        self.capacity = capacity
        self.sizes = sizes
        self.broken = broken
        self.references: Counter[str] = Counter()
        self.leases: set[PageLease] = set()
        self.tried: list[Mix] = []

    def acquire(self, request: Request) -> PageLease | None:
        self.tried.append(request.mix)
        digests = set(request.mix.digests)
        if digests & self.broken:
            raise RequestError(f"adapter {min(digests & self.broken)} cannot be read")
        if not self.can_load(request.mix):
            return None
        self.references.update(digests)
        pages = {"qkv": tuple(range(self.pages(digests)))}
        lease = PageLease(request.mix, pages, {}, {}, tuple(sorted(digests)))
        self.leases.add(lease)
        return lease

    def is_loading(self, mix: Mix) -> bool:  # noqa: ARG002
        return False

    def can_load(self, mix: Mix) -> bool:
        return self.pages((*mix.digests, *+self.references)) <= self.capacity

    def fit_together(self, mixes: Iterable[Mix]) -> bool:
        return self.pages(digest for mix in mixes for digest in mix.digests) <= self.capacity

    def pages(self, digests: Iterable[str]) -> int:
        return sum(self.sizes[digest] for digest in set(digests))

    def release(self, lease: PageLease) -> None:
        self.leases.remove(lease)  # KeyError the second time
        self.references.subtract(lease.keys)


def fingerprints(key: bytes, tokens: list[int]) -> list[int]:
    """What the KV of each position depends on: the key and all tokens up to it."""
    return list(accumulate(tokens, lambda state, token: zlib.crc32(bytes([token]), state), initial=zlib.crc32(key)))[1:]


def next_token(fingerprint: int) -> int:
    return fingerprint // 7 % VOCABULARY


def stops(request: Request, token: int) -> bool:
    return token == STOP and not request.params.ignore_eos


def alone(request: Request) -> list[int]:
    """The whole output of a request."""
    tokens = list(request.prompt)
    while True:
        tokens.append(next_token(fingerprints(request.cache_key, tokens)[-1]))
        output = tokens[len(request.prompt) :]
        if stops(request, tokens[-1]) or len(output) == request.params.max_tokens:
            return output


class Simulation:
    """Drives a scheduler as the engine does, and checks after each step all that must always hold.

    The simulated device works in the order of launches. With `lookahead` a step is committed after the next one has
    been launched, so that the device knows one token more than the host. Every `check_every`-th step is checked.
    """

    def __init__(self, scheduler: Scheduler, pages: FakePages, lookahead: bool = False, check_every: int = 1) -> None:
        self.scheduler = scheduler
        self.lookahead = lookahead
        self.check_every = check_every
        self.launched: list[tuple[Chunk, int | None]] = []
        self.sampled: dict[Sequence, int] = {}
        self.pages = pages
        self.sequences: dict[str, Sequence] = {}
        self.outputs: dict[str, list[int]] = {}
        self.endings: dict[str, list[str]] = defaultdict(list)
        self.progress: dict[Sequence, int] = {}
        self.kv: dict[tuple[int, int], int] = {}
        self.steps = 0
        self.computed = 0  # tokens
        self.scored: defaultdict[str, tuple[int, ...]] = defaultdict(tuple)
        self.yields: Counter[Sequence] = Counter()

    def add(self, request: Request) -> None:
        sequence = Sequence.of(request, arrival=float(self.steps))
        self.sequences[request.id] = sequence
        self.scheduler.add(sequence)

    def end(self, request_id: str, reason: str) -> None:
        sequence = self.sequences.pop(request_id)
        self.scheduler.remove(sequence)
        self.outputs[request_id] = sequence.tokens[sequence.num_prompt :]
        self.endings[request_id].append(reason)
        self.check_integrity()

    def step(self) -> list[Chunk]:
        self.steps += 1
        before = list(self.scheduler.running)
        decoding = [sequence for sequence in before if sequence.num_uncomputed == 1]
        assert decoding[: len(before) - 1] == before[:-1], "only the last one is within its prompt"
        preemptions, yielded = self.scheduler.preemptions, self.scheduler.yielded
        plan = self.scheduler.schedule()
        self.check_integrity()
        self.check_plan(plan.chunks, before)
        planned = {chunk.sequence for chunk in plan.chunks}
        ready = {sequence for sequence in decoding if sequence.ready}
        assert planned >= ready & set(self.scheduler.running), "a decode row waits"
        self.check_preemptions(before, self.scheduler.preemptions - preemptions, self.scheduler.yielded - yielded)
        for sequence, _ in plan.failed:
            self.end(sequence.request.id, "error")
        self.launch(plan.chunks)
        return plan.chunks

    def launch(self, chunks: list[Chunk]) -> None:
        """Write and compute as the device does, then commit this step or, looking ahead, the one before."""
        references = self.scheduler.blocks.references()
        for chunk in chunks:
            self.write(chunk, references)
            self.computed += chunk.num_tokens
        launched = [(chunk, self.compute(chunk)) for chunk in chunks]
        for span in spans_to_score(chunks):
            self.scored[chunks[span.chunk].sequence.request.id] += span.targets
        for chunk, token in launched:
            self.scheduler.advance(chunk)
            self.progress[chunk.sequence] = chunk.sequence.num_computed
            if token is not None:
                self.sampled[chunk.sequence] = token
        if self.lookahead:
            launched, self.launched = self.launched, launched
        self.commit([step for step in launched if self.sequences.get(step[0].sequence.request.id) is step[0].sequence])

    def commit(self, launched: list[tuple[Chunk, int | None]]) -> None:
        for chunk, token in launched:
            self.scheduler.commit(chunk, token)
            self.check_integrity()
        for chunk, token in launched:
            served = chunk.sequence.request
            if token is not None and stops(served, token):
                self.end(served.id, "stop")
            elif chunk.sequence.num_output == served.params.max_tokens:
                self.end(served.id, "length")

    def known(self, sequence: Sequence) -> list[int]:
        """All tokens that the device knows."""
        return [*sequence.tokens, self.sampled[sequence]] if sequence.num_pending else sequence.tokens

    def run(self) -> None:
        """To the end. The oldest running sequence moves in every step, which bounds their number.

        With several tenants it may be preempted, but not again before it has made as many tokens as it recomputed.
        """
        left = sum(len(s.request.prompt) + s.request.params.max_tokens for s in self.sequences.values())
        left *= 1 if len({s.request.tenant for s in self.sequences.values()}) < 2 else 3
        left = 2 * left + 1 if self.lookahead else left  # a token that the host must know takes two steps
        while self.sequences:
            assert left > 0, "no progress"
            self.step()
            left -= 1

    def check_plan(self, chunks: list[Chunk], before: list[Sequence]) -> None:
        scheduler = self.scheduler
        lengths = [chunk.num_tokens for chunk in chunks]
        assert all(length > 0 for length in lengths)
        assert sum(lengths) <= scheduler.max_batch_tokens
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert lengths == sorted(lengths, key=lambda length: length > 1), "chunks of one token come first"
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence in scheduler.running
            assert chunk.start == sequence.num_computed
            assert len(sequence.blocks) * scheduler.blocks.block_size >= chunk.stop
            assert chunk.samples == (chunk.stop == len(sequence))
            assert sequence.ready
            assert sequence.num_sampled < sequence.request.params.max_tokens, "more is sampled than was asked for"
            if sequence in before:
                assert sequence.num_computed == self.progress[sequence], "tokens are skipped or computed twice"
            else:
                assert sequence.num_computed % scheduler.blocks.block_size == 0
                assert sequence.num_computed < len(sequence)

    def check_preemptions(self, before: list[Sequence], preempted: int, yielded: int) -> None:
        """What is preempted for one is not given to another, and a tenant that yields starts nothing instead."""
        running = self.scheduler.running
        left = [sequence for sequence in before if sequence not in running]
        new = [sequence for sequence in running if sequence not in before]
        assert preempted == len(left)
        if preempted > yielded:
            assert not new
            assert not yielded
        elif yielded:
            assert not {s.request.tenant for s in left} & {s.request.tenant for s in new}
            assert new, "nothing came instead of what yielded"
            self.yields.update(left)

    def check_integrity(self) -> None:
        if self.steps % self.check_every:
            return
        self.scheduler.check_integrity()
        assert self.pages.leases == {s.lease for s in self.scheduler.running if s.lease is not None}
        for sequence in self.scheduler.waiting:
            assert not sequence.blocks
            assert sequence.lease is None
            assert sequence.num_computed == 0
        assert len(self.scheduler.waiting) + len(self.scheduler.running) == len(self.sequences)

    def write(self, chunk: Chunk, references: Mapping[int, int]) -> None:
        sequence, size = chunk.sequence, self.scheduler.blocks.block_size
        content = fingerprints(sequence.request.cache_key, self.known(sequence))
        for position in range(chunk.start, chunk.stop):
            block = sequence.blocks[position // size]
            assert references[block] == 1, "a shared block is written"
            self.kv[block, position % size] = content[position]

    def compute(self, chunk: Chunk) -> int | None:
        """Attention over all positions so far; the next token if the chunk yields one."""
        sequence, size = chunk.sequence, self.scheduler.blocks.block_size
        content = fingerprints(sequence.request.cache_key, self.known(sequence)[: chunk.stop])
        read = [self.kv[sequence.blocks[position // size], position % size] for position in range(chunk.stop)]
        assert read == content, "the KV of another prefix is read"
        return next_token(content[-1]) if chunk.samples else None


def simulate(
    num_blocks: int = 64,
    block_size: int = 4,
    *,
    capacity: int = 8,
    sizes: Mapping[str, int] = SIZES,
    broken: frozenset[str] = frozenset(),
    max_num_seqs: int = 8,
    max_batch_tokens: int = 32,
    prefix_cache: bool = True,
    lookahead: bool = False,
    patience: float = PATIENCE,
    quantum: int = QUANTUM,
    clock: Callable[[], float] = float,  # 0.0
) -> Simulation:
    pages = FakePages(capacity, sizes, broken)
    scheduler = Scheduler(
        BlockPool(num_blocks, block_size, prefix_cache),
        pages,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        clock=clock,
        patience=patience,
        quantum=quantum,
    )
    return Simulation(scheduler, pages, lookahead)


def request(
    name: str,
    prompt: int | tuple[int, ...],
    *adapters: str,
    max_tokens: int = 4,
    tenant: str = "default",
    weight: float = 1.0,
    ignore_eos: bool = True,
    penalty: float = 0.0,
    scores: bool = False,
) -> Request:
    mix = Mix.of([(adapter, 1.0) for adapter in adapters])
    tokens = tuple(1 + position % 20 for position in range(prompt)) if isinstance(prompt, int) else prompt
    params = SamplingParams(
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        presence_penalty=penalty,
        prompt_logprobs=0 if scores else None,
    )
    return Request(name, tokens, params, mix=mix, cache_key=mix.digest.encode(), tenant=tenant, weight=weight)


def finish(simulation: Simulation, *requests: Request) -> None:
    for item in requests:
        simulation.add(item)
    simulation.run()
    for item in requests:
        assert simulation.outputs[item.id] == alone(item)
        assert len(simulation.endings[item.id]) == 1
