"""Sums of a prompt's last hidden states, of which its embedding is made.

Like scores (`scoring.py`), they need every row of the prompt computed. A step sums the rows of its chunk, in fp32 and
on the device; whoever asked adds up the sums of the chunks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from server.engine.plan import Chunk
from server.model.decoder import Decoder, Hidden


class PooledRows(NamedTuple):
    """`num_rows` rows of a step from `row` on, of the chunk with this index."""

    chunk: int
    row: int
    num_rows: int


def rows_to_pool(chunks: list[Chunk]) -> list[PooledRows]:
    """What a step that is about to be launched has to sum: what no step before it did."""
    found, row = [], 0
    for index, chunk in enumerate(chunks):
        sequence = chunk.sequence
        if chunk.scores and sequence.request.params.pooled:
            first, stop = max(chunk.start, sequence.first_unscored), min(chunk.stop, sequence.num_prompt)
            if first < stop:
                found.append(PooledRows(index, row + first - chunk.start, stop - first))
        row += chunk.num_tokens
    return found


@dataclass(frozen=True)
class Pooled:
    """The sums of these rows, fp32[N, hidden]."""

    rows: list[PooledRows]
    sums: Tensor

    def to_host(self) -> "Pooled":
        """Start the copy; it may be read when the stream has reached this point."""
        return Pooled(self.rows, self.sums.to("cpu", non_blocking=True))

    def read(self) -> dict[int, bytes | None]:
        """`Output.pooled` by index of the chunk; None where a row is not finite."""
        finite = self.sums.isfinite().all(dim=1).tolist()
        sums = self.sums.numpy()
        return {rows.chunk: sums[i].tobytes() if finite[i] else None for i, rows in enumerate(self.rows)}


@torch.inference_mode()
def pool(decoder: Decoder, hidden: Hidden, rows: list[PooledRows]) -> Pooled:
    """The sums of the states behind the last norm, from the hidden state of the step's rows."""
    sums = [
        decoder.last_states(hidden, torch.arange(first, first + count, device=decoder.device)).float().sum(dim=0)
        for _, first, count in rows
    ]
    return Pooled(rows, torch.stack(sums))
