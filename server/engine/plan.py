"""One step as the scheduler plans it: chunks of sequences under a budget of tokens."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from server.engine.config import RequestError
from server.engine.sequence import Sequence

MISSING_MIXES = 64  # mixes tried in vain in one step; each costs a look at all residents that could make room
MISSED, MISSED_BY_TENANT = 256, 128  # sequences passed over for their pages in one step


@dataclass(frozen=True)
class Chunk:
    """Tokens start .. start + num_tokens of a sequence, its next uncomputed ones.

    `samples`: the chunk reaches the end of the sequence, so that its last row yields a token. Where a router has still
    to choose from the prompt it `decides` instead.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    decides: bool = False

    @classmethod
    def of(cls, sequence: Sequence, num_tokens: int) -> "Chunk":
        start = sequence.num_computed
        is_last, undecided = start + num_tokens == len(sequence), sequence.undecided
        return cls(sequence, start, num_tokens, is_last and not undecided, is_last and undecided)

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens

    @property
    def scores(self) -> bool:
        """Whether rows of the prompt may still have to tell how likely the tokens behind them were, or be pooled."""
        return self.sequence.num_unscored > 0 and not self.sequence.undecided


@dataclass(frozen=True)
class LayerRun:
    """All of a prompt through `count` layers from `start` on, for a router that decides layer by layer.

    `num_tokens` of a chunk would cost as much.
    """

    sequence: Sequence
    start: int
    count: int
    num_tokens: int
    finishes: bool

    @classmethod
    def of(cls, sequence: Sequence, budget: int) -> "LayerRun":
        """As many layers as the budget of tokens allows, one at least."""
        assert sequence.router is not None
        depth, length, start = sequence.router.depth, sequence.num_prompt, sequence.layers_done
        count = min(depth - start, max(1, budget * depth // length))
        return cls(sequence, start, count, -(-count * length // depth), start + count == depth)


@dataclass
class Plan:
    """One step: chunks of one token first, then longer ones; some `layers` of one prompt beside them; and sequences
    that can never be admitted, with the reason.

    The failed ones are still queued: whoever runs the plan ends them by `Scheduler.remove`. `budget`: tokens that it
    still has room for. Tenants that `started` a sequence yield none in this step, tenants that are `passed` start none.
    """

    budget: int
    chunks: list[Chunk] = field(default_factory=list)
    layers: LayerRun | None = None
    failed: list[tuple[Sequence, RequestError]] = field(default_factory=list)
    started: set[str] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)  # digests of mixes whose pages cannot be had in this step
    missed: Counter[str] = field(default_factory=Counter)  # sequences that were passed over for that, by tenant
    num_missed: int = 0

    def miss(self, sequence: Sequence) -> None:
        """A sequence is passed over for its pages."""
        self.missed[sequence.request.tenant] += 1
        self.num_missed += 1

    def only_plain(self, tenant: str) -> bool:
        """Whether nothing with adapters is tried any more, since too much was in vain."""
        return (
            len(self.missing) >= MISSING_MIXES or self.num_missed >= MISSED or self.missed[tenant] >= MISSED_BY_TENANT
        )

    def run(self, sequence: Sequence) -> None:
        """Plan the next chunk of a sequence, or its next layers, as long as the budget allows."""
        if sequence.layered:
            if sequence.num_layers_left and self.layers is None and self.budget > 0:
                self.layers = LayerRun.of(sequence, self.budget)
                self.budget = max(0, self.budget - self.layers.num_tokens)
            return
        count = min(sequence.num_uncomputed, self.budget)
        if count:
            self.chunks.append(Chunk.of(sequence, count))
            self.budget -= count

    def has_tokens_without(self, sequences: Collection[Sequence]) -> bool:
        """Whether there is budget left, or would be if these were dropped."""
        own = any(chunk.sequence in sequences for chunk in self.chunks)
        return self.budget > 0 or own or (self.layers is not None and self.layers.sequence in sequences)

    def drop(self, sequence: Sequence) -> None:
        if self.layers is not None and self.layers.sequence is sequence:
            self.budget += self.layers.num_tokens
            self.layers = None
        self.budget += sum(chunk.num_tokens for chunk in self.chunks if chunk.sequence is sequence)
        self.chunks = [chunk for chunk in self.chunks if chunk.sequence is not sequence]
