"""Tenants in simulation, over time on a fake clock: what each asks for, and what it is served."""

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import count

from scheduler_simulation import Simulation, alone, request, simulate

from server.engine.fairness import INPUT_PRICE, OUTPUT_PRICE
from server.engine.plan import Chunk
from server.engine.sequence import Request, Sequence

ROOM = {"num_blocks": 150, "block_size": 16, "max_batch_tokens": 64}


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_step(self, chunks: list[Chunk]) -> None:
        """Seconds of a step: its weights are read once, and its tokens computed."""
        self.now += 0.02 + 0.0005 * sum(chunk.num_tokens for chunk in chunks)


@dataclass
class Backlog:
    """A tenant that always has `waiting` requests waiting."""

    tenant: str
    prompt: int
    max_tokens: int
    weight: float = 1.0
    waiting: int = 4

    def requests(self, simulation: Simulation, number: "count[int]") -> list[Request]:
        waits = sum(sequence.request.tenant == self.tenant for sequence in simulation.scheduler.waiting)
        return [
            replace(
                request(f"{self.tenant}{i}", text(i, self.prompt), max_tokens=self.max_tokens, weight=self.weight),
                tenant=self.tenant,
            )
            for i in (next(number) for _ in range(self.waiting - waits))
        ]


def text(number: int, length: int) -> tuple[int, ...]:
    """Prompts that share no block."""
    return (number % 250, number // 250, *range(length))[:length]


@dataclass
class Contest:
    """A simulation over time, and what each tenant was served in it: priced tokens, as the counters price them."""

    simulation: Simulation
    clock: Clock
    sequences: list[Sequence] = field(default_factory=list)
    numbers: "count[int]" = field(default_factory=count)

    def add(self, *requests: Request) -> None:
        for item in requests:
            self.simulation.add(item)
            self.sequences.append(self.simulation.sequences[item.id])

    def step(self, *backlogs: Backlog) -> None:
        for backlog in backlogs:
            self.add(*backlog.requests(self.simulation, self.numbers))
        self.clock.pass_step(self.simulation.step())

    def served(self) -> Counter[str]:
        served: Counter[str] = Counter()
        for sequence in self.sequences:
            if sequence.first_scheduled is not None:
                tokens = INPUT_PRICE * sequence.num_prompt + OUTPUT_PRICE * sequence.num_output
                served[sequence.request.tenant] += tokens  # type: ignore[assignment]
        return served

    def waits(self, tenant: str) -> bool:
        return any(sequence.request.tenant == tenant for sequence in self.simulation.scheduler.waiting)

    def runs(self, tenant: str) -> bool:
        return any(sequence.request.tenant == tenant for sequence in self.simulation.sequences.values())

    def finish(self) -> None:
        """Every text is what it would be alone, however often its sequence was preempted."""
        self.simulation.run()
        for sequence in self.sequences:
            assert self.simulation.outputs[sequence.request.id] == alone(sequence.request)


def contest(**settings: object) -> Contest:
    clock = Clock()
    simulation = simulate(**{**ROOM, **settings}, clock=clock)  # type: ignore[arg-type]
    simulation.check_every = 10
    return Contest(simulation, clock)


def flood(count: int, prompt: int, max_tokens: int, weight: float = 1.0) -> list[Request]:
    return [
        request(f"flood{i}", text(1000 + i, prompt), max_tokens=max_tokens, tenant="flood", weight=weight)
        for i in range(count)
    ]


def difference(before: Counter[str], after: Counter[str]) -> Counter[str]:
    return Counter({tenant: after[tenant] - before[tenant] for tenant in after})


MODEST = Backlog("modest", 8, 24)
