"""Which running sequences yield when a tenant that was served less than its share finds no free row or no free KV.

Turns alone do not help against requests that run long: whoever comes first keeps every row until its requests end. So
rows, or KV, are taken back from the tenant that holds most for its weight, its last admitted sequence first, if

- it was served more than it was entitled to beside the claimant's tenant (virtual counters), by more priced tokens than
  `patience` and one recomputation of all that is taken. So an admission in turn, which charges a prompt, is never the
  ground for taking its row back;
- it keeps at least as much for its weight as the claimant's tenant then has (max-min fairness). A tenant with nothing
  running may take its first row nevertheless: where rows are fewer than tenants, they take turns;
- the sequence has made a token or, if it was preempted before, `quantum` tokens since and as many as it recomputed. So
  preemptions are bounded by requests + output tokens / quantum, and recomputation by what was computed anyway.
"""

from collections import defaultdict
from collections.abc import Sequence as Rows
from collections.abc import Set

from server.engine.blocks import BlockPool
from server.engine.fairness import FairQueue
from server.engine.sequence import Sequence

# 64 requests of 8 + 96 tokens flood 16 rows, then others of 8 + 24 always wait: the first of these is admitted 3, 4, 6
# or 10 steps later with a patience of 16, 64, 128 or 256, and 8 rows yield to 250 requests with each of them.
PATIENCE = 64.0
QUANTUM = 32


class Shares:
    """Compares what tenants hold with what they are owed."""

    def __init__(self, queue: FairQueue, blocks: BlockPool, patience: float = PATIENCE, quantum: int = QUANTUM) -> None:
        self.queue = queue
        self.blocks = blocks
        self.patience = patience
        self.quantum = quantum

    def victims(
        self, claimant: Sequence, running: Rows[Sequence], spared: Set[str], *, row: bool, missing: int
    ) -> list[Sequence] | None:
        """The sequences to preempt for one that waits; None when its tenant has no claim to all that it lacks.

        spared: tenants that do not yield now. row: a row is lacking. missing: blocks that are lacking (none if <= 0).
        """
        if not self.queue.contended:
            return None
        left, found, cost = list(running), list[Sequence](), self.patience
        while row or self.blocks.freed_by(sequence.blocks for sequence in found) < missing:
            victim = self._next(claimant, left, spared, cost, row)
            if victim is None:
                return None
            row, cost = False, cost + len(victim)
            found.append(victim)
            left.remove(victim)
        return found

    def outgrown(self, running: Rows[Sequence]) -> Sequence:
        """The one to preempt when sequences outgrow the blocks: the last admitted, or a richer tenant's last one."""
        last = running[-1]
        tenant = last.request.tenant
        if all(sequence.request.tenant == tenant for sequence in running):
            return last
        held, weight = held_blocks(running), self.queue.weight
        most = max(held, key=lambda name: (held[name] / weight(name), name))
        richer = next(sequence for sequence in reversed(running) if sequence.request.tenant == most)
        keeps = (held[most] - len(richer.blocks)) / weight(most)
        return richer if self.queue.excess(most, tenant) > 0 and keeps >= held[tenant] / weight(tenant) else last

    def started(self, sequence: Sequence, again: bool) -> None:
        """A sequence runs: it stays until its first token or, `again`, until that was worth its recomputation."""
        sequence.kept_until = len(sequence) + (self.quantum + sequence.num_uncomputed if again else 1)

    def _next(
        self, claimant: Sequence, running: Rows[Sequence], spared: Set[str], cost: float, row: bool
    ) -> Sequence | None:
        """Who yields the next row, or next blocks, if the claimant's tenant is owed more than `cost` besides."""
        queue, tenant = self.queue, claimant.request.tenant
        held = queue.running if row else held_blocks(running)
        needed = 1 if row else self.blocks.blocks_for(len(claimant))
        claimed = (held[tenant] + needed) / queue.weight(tenant) if tenant in held else 0.0
        debtors = [
            (own / queue.weight(name), name)
            for name, own in held.items()
            if name != tenant and name not in spared and queue.excess(name, tenant) > cost
        ]
        last = last_that_may_yield(running) if debtors else {}
        for ratio, other in sorted(debtors, reverse=True):
            if ratio < claimed:
                break
            victim = last.get(other)
            if victim is None or queue.excess(other, tenant) <= cost + len(victim):
                continue
            if (held[other] - (1 if row else len(victim.blocks))) / queue.weight(other) >= claimed:
                return victim
        return None


def held_blocks(running: Rows[Sequence]) -> dict[str, int]:
    """Blocks by tenant; those that its sequences share count once."""
    held: dict[str, set[int]] = defaultdict(set)
    for sequence in running:
        held[sequence.request.tenant].update(sequence.blocks)
    return {tenant: len(blocks) for tenant, blocks in held.items()}


def last_that_may_yield(running: Rows[Sequence]) -> dict[str, Sequence]:
    """By tenant. One look at all that run, however many tenants they have."""
    return {sequence.request.tenant: sequence for sequence in running if may_yield(sequence)}


def may_yield(sequence: Sequence) -> bool:
    """Whether a sequence has run for long enough, and is not about to end with its pending token."""
    return len(sequence) >= sequence.kept_until and sequence.num_sampled < sequence.request.params.max_tokens
