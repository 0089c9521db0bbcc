"""A server that is nothing but its queue."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import count

from server.engine.fairness import EXPECTED, INPUT_PRICE, OUTPUT_PRICE, FairQueue
from server.engine.sequence import Request, SamplingParams, Sequence

Work = tuple[int, int]
"""Prompt tokens and output tokens of a request."""


class Server:
    """Serves a FairQueue with a fixed number of rows: a whole prompt on admission, then one token a step and row."""

    def __init__(self, rows: int) -> None:
        self.queue = FairQueue()
        self.rows = rows
        self.running: list[Sequence] = []
        self.served: dict[str, float] = defaultdict(float)
        self.ids = count()

    def submit(self, tenant: str, *works: Work, weight: float = 1.0) -> None:
        for prompt, output in works:
            params = SamplingParams(max_tokens=output)
            request = Request(str(next(self.ids)), (0,) * prompt, params, tenant=tenant, weight=weight)
            self.queue.push(Sequence.of(request))

    def step(self) -> None:
        for sequence in list(self.running):
            sequence.tokens.append(0)
            self.queue.charge(sequence, 1, OUTPUT_PRICE)
            self.served[sequence.request.tenant] += OUTPUT_PRICE
            if sequence.num_output == sequence.request.params.max_tokens:
                self.running.remove(sequence)
                self.queue.stopped(sequence)
        for sequence in self.queue.in_turn():
            if len(self.running) == self.rows:
                break
            self.queue.started(sequence)
            self.running.append(sequence)
            self.served[sequence.request.tenant] += INPUT_PRICE * sequence.num_prompt

    def steps_while_both_wait(self, *tenants: str) -> Iterator[None]:
        while {sequence.request.tenant for sequence in self.queue} >= set(tenants):
            self.step()
            yield

    def drain(self) -> None:
        while self.running or len(self.queue):
            self.step()


def bound(rows: int, longest_prompt: int, longest_output: int) -> float:
    """Largest difference in service between two tenants that both wait: theorem 4.4 of Sheng et al.

    Beside it, what turns look ahead: so much can a tenant be ahead of the other when it is admitted all the same.
    """
    return 2 * max(INPUT_PRICE * longest_prompt, OUTPUT_PRICE * rows * longest_output) + OUTPUT_PRICE * EXPECTED * rows
