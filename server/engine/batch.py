"""From a plan to tensors: token ids, positions, KV slots, and the mapping matrix of every target group."""

import torch

from adapters_store.types import GROUPS
from kernels.gather import build_attention
from kernels.mapping import Mapping, RowSpan, build_mapping
from server.engine.plan import Chunk
from server.model.decoder import ForwardBatch

Spans = tuple[RowSpan, ...]


class BatchBuilder:
    """Builds each step's batch. The mapping of a group is kept while its spans stay the same, as in steady decoding."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        self._mappings: dict[str, tuple[Spans, Mapping | None]] = {}

    def build(self, chunks: list[Chunk]) -> ForwardBatch:
        """`chunks` as the scheduler orders them: those of one token first."""
        ids: list[int] = []
        positions: list[int] = []
        logit_rows: list[int] = []
        for chunk in chunks:
            ids += chunk.sequence.tokens[chunk.start : chunk.stop]
            positions += range(chunk.start, chunk.stop)
            if chunk.samples:
                logit_rows.append(len(ids) - 1)
        attention = build_attention(
            [chunk.sequence.blocks for chunk in chunks],
            [chunk.num_tokens for chunk in chunks],
            [chunk.stop for chunk in chunks],
            self.block_size,
            self.device,
        )
        return ForwardBatch(
            ids=torch.tensor(ids, device=self.device),
            positions=torch.tensor(positions, device=self.device),
            attention=attention,
            mappings={group.name: self._mapping(group.name, chunks) for group in GROUPS},
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=self.device),
        )

    def _mapping(self, group: str, chunks: list[Chunk]) -> Mapping | None:
        spans = spans_of(group, chunks)
        known = self._mappings.get(group)
        if known is None or known[0] != spans:
            known = self._mappings[group] = (spans, build_mapping(spans, self.device))
        return known[1]


def spans_of(group: str, chunks: list[Chunk]) -> Spans:
    """Which rows use which pages of a target group."""
    spans, row = [], 0
    for chunk in chunks:
        lease = chunk.sequence.lease
        if lease is not None and lease.pages[group]:
            stop = row + chunk.num_tokens
            spans.append(RowSpan(row, stop, lease.pages[group], lease.weights[group], lease.ranks[group]))
        row += chunk.num_tokens
    return tuple(spans)
