"""Conversations for a simulation: each turn's prompt is all that was said before, behind its adapter's instructions."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from server.engine.placement_simulation import Arrival
from server.engine.prefixes import prompt_prefixes
from server.engine.workload import gamma_arrivals, popular

BLOCK = 16
VOCABULARY = 32_000


@dataclass(frozen=True)
class Talk:
    """Tokens are uniform in [low, high): of an adapter's instructions, which all its conversations begin with, of what
    a user says, and of an answer. A conversation has `turns` on average, geometrically distributed; `think` are the
    mean seconds, exponentially distributed, from an answer to the next question; `step` those of a token.
    """

    instructions: tuple[int, int] = (64, 512)
    question: tuple[int, int] = (16, 256)
    answer: tuple[int, int] = (8, 512)
    turns: float = 4.0
    think: float = 20.0
    step: float = 0.02


class Blocks:
    """Names for full blocks of tokens: equal ones behind equal ones have one name."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, bytes], int] = {}

    def extend(self, names: list[int], tokens: np.ndarray) -> None:
        """Append those of `tokens` (int64) that `names` does not have yet."""
        for start in range(len(names) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
            key = names[-1] if names else -1, tokens[start : start + BLOCK].tobytes()
            names.append(self._names.setdefault(key, len(self._names)))


def conversations(
    talk: Talk, requests: int, rate: float, adapters: int, exponent: float, seed: int, variation: float = 1.0
) -> list[Arrival]:
    """So many requests, `rate` a second. Conversations begin in gamma arrivals, with adapters of power-law popularity.

    An answer is taken to begin when it is asked for: who waits longer is asked the next question sooner.
    """
    rng = np.random.default_rng([seed, 6])
    instructions = [_tokens(rng, talk.instructions) for _ in range(adapters)]
    starts = gamma_arrivals(requests, rate / talk.turns, seed, variation)
    blocks, arrivals = Blocks(), list[Arrival]()
    under_way: list[tuple[float, int, Arrival, Iterator[Arrival]]] = []  # the next turn of each

    def go_on_until(now: float) -> None:
        while under_way and under_way[0][0] <= now and len(arrivals) < requests:
            _, number, arrival, turns = heapq.heappop(under_way)
            arrivals.append(arrival)
            for following in islice(turns, 1):
                heapq.heappush(under_way, (following.at, number, following, turns))

    for number, (start, adapter) in enumerate(zip(starts, popular(requests, adapters, exponent, seed), strict=True)):
        go_on_until(start)
        if len(arrivals) == requests:
            break
        turns = _turns(talk, start, adapter, instructions[adapter], blocks, rng)
        first = next(turns)
        heapq.heappush(under_way, (first.at, number, first, turns))
    go_on_until(float("inf"))
    return arrivals


def _turns(
    talk: Talk, at: float, adapter: int, tokens: np.ndarray, blocks: Blocks, rng: np.random.Generator
) -> Iterator[Arrival]:
    names: list[int] = []
    root = str(adapter)
    for _ in range(rng.geometric(1 / talk.turns)):
        tokens = np.concatenate([tokens, _tokens(rng, talk.question)])
        prefixes = prompt_prefixes(root.encode(), tokens.tolist())
        prompt = (len(tokens) - 1) // BLOCK  # the last token is computed in any case
        answer = _tokens(rng, talk.answer)
        tokens = np.concatenate([tokens, answer])
        blocks.extend(names, tokens)
        seconds = len(answer) * talk.step
        yield Arrival(at, root, seconds, tuple(names), prompt, prefixes)
        at += seconds + rng.exponential(talk.think)


def _tokens(rng: np.random.Generator, lengths: tuple[int, int]) -> np.ndarray:
    return rng.integers(0, VOCABULARY, rng.integers(*lengths))
