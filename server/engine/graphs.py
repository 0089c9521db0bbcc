"""Steps on a GPU: metadata in one copy, the forward pass from a captured CUDA graph, tokens that stay on the device.

A graph has a capacity (`StepShape`): so many token rows, so many tiles of adapters in so many groups. A step runs in
the smallest one that holds it; one that none holds runs without a graph, slower and with the same result.
"""

import gc
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.attention import query_blocks
from kernels.triton_ops import TritonOps
from server.engine.capacity import DECODE_BLOCK, MIXED_BLOCK, Capacities
from server.engine.decided_memory import DecidedMemory
from server.engine.decided_rows import DecidedBuilder, with_decided
from server.engine.gate_parts import Columns
from server.engine.gate_stage import staged_shares
from server.engine.gates import Shares, SlotMemory
from server.engine.plan import Chunk
from server.engine.planner import StepTiles, TilePlanner, nothing
from server.engine.pooling import pool, rows_to_pool
from server.engine.prompt_routing import PromptRouting, prompt_routing
from server.engine.scoring import score, spans_to_score
from server.engine.staging import Staging, StepShape, StepViews, fill
from server.engine.steps import Computed
from server.model.decoder import Decoder, ForwardBatch, Hidden, KvCache, Pages

logger = logging.getLogger(__name__)

MOST_GRAPHS = 256
"""Each keeps some megabytes on the device: 6 sizes of tiles, 2 kinds and 15 sets of groups make 180 a row count."""


class GraphSteps:
    """Runs the steps of one model on one GPU. On a CPU it runs Triton's interpreter and captures nothing, for tests."""

    lookahead = True

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KvCache,
        pages: Pages,
        capacities: Capacities,
        *,
        block_size: int,
        max_model_len: int,
        use_graphs: bool = True,
        gates: SlotMemory | None = None,
    ) -> None:
        if not isinstance(decoder.ops, TritonOps):
            raise TypeError("captured steps need the Triton backend")
        self.decoder = decoder
        self.ops = decoder.ops
        self.kv_cache = kv_cache
        self.pages = pages
        self.capacities = capacities
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.use_graphs = use_graphs
        self.gates = gates
        self.eager_steps = 0
        device, rows = decoder.device, capacities.max_num_seqs
        decoder.rotary.grow(max_model_len)
        self._sampled = torch.zeros(rows, dtype=torch.int64, device=device)
        self._logits = torch.empty(rows, decoder.config.vocab_size, dtype=decoder.dtype, device=device)
        self._table_words = rows * -(-max_model_len // block_size)
        self._staging = Staging(self._table_words + capacities.words, device)
        self._eager_staging = self._staging
        self._planner = TilePlanner(None if gates is None else gates.shape)
        self._decided = DecidedBuilder(device)
        self._decisions = DecidedMemory(decoder.config.num_layers, capacities.max_batch_tokens, rows, device)
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph] = {}
        self._without: set[StepShape] = set()
        self._pool: Any = None
        self._capturing: torch.cuda.Stream | None = None

    @property
    def num_graphs(self) -> int:
        return len(self._graphs)

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> Computed:
        """Nothing waits for the device.

        Steps that score tokens of prompts, or pool them, or in which routers read them, run without a graph.
        """
        rows = sum(chunk.num_tokens for chunk in chunks)
        decoding = rows == len(chunks)
        tiles = self._planner.plan(chunks, DECODE_BLOCK if decoding else MIXED_BLOCK)
        shape = self.capacities.smallest(rows, decoding, tiles.plans, tiles.gates is not None)
        routing = prompt_routing(chunks, lambda: _columns(tiles), self._decided)
        is_held = routing is not None and routing.decided is not None and self._decisions.write(routing.decided)
        if shape is not None and routing is not None:
            shape = self._with_decisions(shape) if is_held and routing.reading is None else None
        spans, pooling, staging = spans_to_score(chunks), rows_to_pool(chunks), self._staging
        scores, pooled = None, None
        if shape is None or spans or pooling or not self.use_graphs:
            staging, shape, hidden = self._run_eagerly(chunks, tiles, routing, is_held)
            scores = score(self.decoder, hidden, spans) if spans else None
            pooled = pool(self.decoder, hidden, pooling) if pooling else None
        else:
            graph = self._graphs.get(shape) or self._capture(shape)
            self._stage(self._staging, shape, chunks, tiles)
            if graph is None:
                self._run(self._staging, shape)
            else:
                graph.replay()
        count = sum(chunk.samples for chunk in chunks)
        shares = None if tiles.gates is None else self._shares(chunks, staging, shape)
        return Computed(self._logits[:count], self._sampled[:count].clone(), shares, scores, pooled)

    @torch.inference_mode()
    def batches(self, chunks: list[Chunk]) -> list[tuple[ForwardBatch, Columns]]:
        """Each has a staged array of its own."""
        found = []
        for chunk in chunks:
            tiles = TilePlanner().plan([chunk], MIXED_BLOCK)
            shape = self._exact_shape([chunk], tiles)
            staging = Staging(shape.words + self._table_words, self.decoder.device)
            self._stage(staging, shape, [chunk], tiles)
            views = StepViews.of(staging.words, shape, self.block_size, self.max_model_len)
            ids = self.ops.input_ids(views.ids, views.sources, self._sampled)
            batch = ForwardBatch(ids, views.positions, views.attention, views.mappings, views.logit_rows)
            found.append((batch, _columns(tiles)))
        return found

    def remember(self, tokens: Tensor) -> None:
        self._sampled[: len(tokens)].copy_(tokens)

    @torch.inference_mode()
    def capture_common(self) -> int:
        """Capture the graphs that steady traffic needs; returns their number. Others are captured when first used."""
        gc.collect()  # what the collector frees in the middle of a capture could break it
        for shape in self.capacities.common() if self.use_graphs else ():
            if shape not in self._graphs:
                self._capture(shape)
        return self.num_graphs

    def _stage(self, staging: Staging, shape: StepShape, chunks: list[Chunk], tiles: StepTiles) -> None:
        words = {group: tiles.words(group, capacity) for group, capacity in shape.tiles}
        staging.send(fill(staging.begin(), shape, chunks, words, self.block_size, tiles.gates))

    def _shares(self, chunks: list[Chunk], staging: Staging, shape: StepShape) -> Shares:
        """Sums: the next step writes over their summands."""
        views = StepViews.of(staging.words, shape, self.block_size, self.max_model_len)
        assert views.gates is not None, "a step with gated rows has room for gates"
        return staged_shares(chunks, views.gates.rows.totals)

    def _with_decisions(self, shape: StepShape) -> StepShape | None:
        """With room for what routers decided; None where a kernel would read columns that are not there."""
        pages = [tiles.padded_pages for _, tiles in shape.tiles]
        fits = self._decisions.fits(shape.rows, decoding=shape.decodes == shape.rows, pages=pages)
        return replace(shape, decided=True) if fits else None

    def _run(self, staging: Staging, shape: StepShape, routing: PromptRouting | None = None) -> Hidden:
        """The whole step: reads the staged metadata, writes `_logits` and `_sampled`."""
        views = StepViews.of(staging.words, shape, self.block_size, self.max_model_len)
        router = None if views.gates is None or self.gates is None else self.gates.router(views.gates)
        ids = self.ops.input_ids(views.ids, views.sources, self._sampled)
        batch = ForwardBatch(ids, views.positions, views.attention, views.mappings, views.logit_rows, router)
        if shape.decided:
            pages = {group: tiles.padded_pages for group, tiles in shape.tiles}
            seen = self._decisions.view(shape.rows, decoding=shape.decodes == shape.rows, pages=pages)
            batch.router = with_decided(router, seen)
        elif routing is not None:
            batch.router = with_decided(router, routing.decided)
        batch.observer = None if routing is None else routing.reading
        hidden = self.decoder.hidden(batch, self.kv_cache, self.pages)
        logits = self.decoder.logits(hidden, views.logit_rows)
        self._sampled[: len(logits)].copy_(self.ops.greedy(logits))
        self._logits[: len(logits)].copy_(logits)
        return hidden

    def _run_eagerly(
        self, chunks: list[Chunk], tiles: StepTiles, routing: PromptRouting | None, decided: bool
    ) -> tuple[Staging, StepShape, Hidden]:
        """A step of exactly its own size; metadata that outgrow the common array get one of their own."""
        self.eager_steps += 1
        shape = replace(self._exact_shape(chunks, tiles), decided=decided)
        if shape.words + self._table_words > self._eager_staging.capacity:
            self._eager_staging = Staging(shape.words + self._table_words, self.decoder.device)
        self._stage(self._eager_staging, shape, chunks, tiles)
        return self._eager_staging, shape, self._run(self._eager_staging, shape, routing)

    def _exact_shape(self, chunks: list[Chunk], tiles: StepTiles) -> StepShape:
        decodes = next((i for i, chunk in enumerate(chunks) if chunk.num_tokens > 1), len(chunks))
        blocks = len(query_blocks([(0, 0, chunk.num_tokens, chunk.start) for chunk in chunks[decodes:]]))
        samples = max(1, sum(chunk.samples for chunk in chunks))
        rows = sum(chunk.num_tokens for chunk in chunks)
        own = tuple((group, plan.shape) for group, plan in tiles.plans.items())
        gates = None if tiles.gates is None else self.capacities.gates
        return StepShape(rows, decodes, blocks, samples, own, gates)

    def _capture(self, shape: StepShape) -> torch.cuda.CUDAGraph | None:
        """Run once, which compiles, on padding that touches nothing; then capture.

        None where that fails, as for lack of memory, or where there are graphs enough: the step runs without.
        """
        if shape in self._without or self.num_graphs >= MOST_GRAPHS:
            return None
        self._stage(self._staging, shape, [], nothing(shape))
        sampled = self._sampled.clone()  # the step about to be launched may look ahead to them
        # one stream for all captures: cuBLAS keeps a workspace for each that it meets
        stream = self._capturing = self._capturing or torch.cuda.Stream(self.decoder.device)
        stream.wait_stream(torch.cuda.current_stream())
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            self._run(self._staging, shape)
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    self._run(self._staging, shape)
                finally:
                    graph.capture_end()
                self._graphs[shape] = graph
            except RuntimeError as error:
                logger.warning("a step of %d rows runs without a graph: %s", shape.rows, error)
                self._without.add(shape)
        torch.cuda.current_stream().wait_stream(stream)
        self._sampled.copy_(sampled)
        return self._graphs.get(shape)


def _columns(tiles: StepTiles) -> Columns:
    columns = {}
    for group, plan in tiles.plans.items():
        pages = plan.pages.tolist()
        columns[group] = (*pages, *[-1] * (plan.shape.padded_pages - len(pages)))
    return columns
