"""Prompts whose routers read the base model's hidden states while they are computed as rows of a step."""

from collections.abc import Sequence as List

import torch
from torch import Tensor

from server.engine.plan import Chunk
from server.engine.prompt_routers import PromptPass, PromptUse, Verdict
from server.engine.sequence import Sequence


class StepReading:
    """Hands the hidden states of a step's rows to the routers that have still to decide for their prompts."""

    def __init__(self, chunks: List[Chunk], device: torch.device) -> None:
        """Those chunks are read whose sequence is undecided."""
        self.depth = 0
        self._readers: list[tuple[PromptPass, int, int]] = []
        rows: list[int] = []
        row = 0
        for chunk in chunks:
            if chunk.sequence.undecided:
                reading = started(chunk.sequence)
                self._readers.append((reading, chunk.num_tokens, _depth(chunk.sequence)))
                rows += range(row, row + chunk.num_tokens)
                self.depth = max(self.depth, _depth(chunk.sequence))
            row += chunk.num_tokens
        self.rows = torch.tensor(rows, dtype=torch.int64, device=device)

    def observe(self, layer: int, hidden: Tensor) -> None:
        """hidden [R, d]: the states of `rows` before a layer."""
        parts = hidden.split([count for _, count, _ in self._readers])
        for (reading, _, depth), part in zip(self._readers, parts, strict=True):
            if layer < depth:
                reading.read(layer, part)


def step_reading(chunks: List[Chunk], device: torch.device) -> StepReading | None:
    """None if nobody reads."""
    return StepReading(chunks, device) if any(chunk.sequence.undecided for chunk in chunks) else None


def verdicts(chunks: List[Chunk]) -> list[tuple[Sequence, Verdict]]:
    """Of the chunks that decide, once they have been launched."""
    return [(chunk.sequence, started(chunk.sequence).verdict()) for chunk in chunks if chunk.decides]


def started(sequence: Sequence) -> PromptPass:
    """What the sequence's router has read of its prompt so far."""
    if sequence.reading is None:
        use: PromptUse | None = sequence.asked.prompt_router
        assert use is not None
        assert sequence.router is not None
        sequence.reading = sequence.router.start(use)
    return sequence.reading


def _depth(sequence: Sequence) -> int:
    assert sequence.router is not None
    return sequence.router.depth
