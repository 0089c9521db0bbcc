"""How a step runs on a device: on a CPU as it comes, on a GPU from captured graphs with the host one step ahead."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from server.engine.batch import BatchBuilder
from server.engine.decided_rows import DecidedBuilder
from server.engine.gate_parts import Columns, make_router, part_shares
from server.engine.gates import GateFactory, Shares
from server.engine.plan import Chunk
from server.engine.pooling import Pooled, pool, rows_to_pool
from server.engine.prompt_routing import prompt_routing
from server.engine.scoring import Scores, score, spans_to_score
from server.model.decoder import Decoder, ForwardBatch, KvCache, Pages


class Computed(NamedTuple):
    """Of a launched step: logits [R, vocab] of the chunks that yield a token, and their most likely tokens int64[R] if
    these are known too; how much gates counted, if any rows are routed by token; the scores of its prompts' tokens, and
    the sums of their states."""

    logits: Tensor
    greedy: Tensor | None
    shares: Shares | None
    scores: Scores | None = None
    pooled: Pooled | None = None


class Steps(Protocol):
    """Runs steps in order. `lookahead`: a step may be launched before the tokens of the one before it are known."""

    lookahead: bool

    def launch(self, chunks: list[Chunk]) -> Computed: ...

    def batches(self, chunks: list[Chunk]) -> list[tuple[ForwardBatch, Columns]]:
        """Of each chunk a batch of its own, and the pages of its mappings' columns, that later steps leave alone."""
        ...

    def remember(self, tokens: Tensor) -> None:
        """int64[R]: the tokens chosen from the logits of the last launch, for a launch that looks ahead."""
        ...


class EagerSteps:
    """Builds each step's tensors and runs the model on them."""

    lookahead = False

    def __init__(
        self, decoder: Decoder, kv_cache: KvCache, pages: Pages, block_size: int, gates: GateFactory | None = None
    ) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.pages = pages
        self.gates = gates
        self._builder = BatchBuilder(block_size, decoder.device)
        self._decided = DecidedBuilder(decoder.device)

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> Computed:
        batch = self._builder.build(chunks)
        columns = columns_of(batch)
        batch.router = router = make_router(self.gates, chunks, columns, self.decoder.device)
        routing = prompt_routing(chunks, lambda: columns, self._decided)
        if routing is not None:
            routing.act(batch)
        hidden = self.decoder.hidden(batch, self.kv_cache, self.pages)
        spans = spans_to_score(chunks)
        scores = score(self.decoder, hidden, spans) if spans else None
        rows = rows_to_pool(chunks)
        pooled = pool(self.decoder, hidden, rows) if rows else None
        shares = None if router is None else part_shares(chunks, router)
        return Computed(self.decoder.logits(hidden, batch.logit_rows), None, shares, scores, pooled)

    def batches(self, chunks: list[Chunk]) -> list[tuple[ForwardBatch, Columns]]:
        found = []
        for chunk in chunks:
            batch = self._builder.build([chunk])
            found.append((batch, columns_of(batch)))
        return found

    def remember(self, tokens: Tensor) -> None:
        """The host knows all tokens before the next launch."""


def columns_of(batch: ForwardBatch) -> Columns:
    """Of a batch with the reference backend's mappings."""
    return {group: mapping.pages for group, mapping in batch.mappings.items() if mapping is not None}
