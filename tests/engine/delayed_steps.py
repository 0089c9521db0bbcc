"""An engine on the CPU whose host is one step ahead, as it is on a GPU."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from server.engine.batch import BatchBuilder
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.plan import Chunk
from server.engine.pooling import pool, rows_to_pool
from server.engine.runner import Runner
from server.engine.scoring import score, spans_to_score
from server.engine.steps import Computed

CPU = {"device": "cpu", "kv_memory": 1 << 22, "page_memory": 1 << 22}


class DelayedSteps:
    """The reference backend as a device that alone knows the tokens of the last launch, by row."""

    lookahead = True

    def __init__(self, runner: Runner, block_size: int) -> None:
        self.runner = runner
        self.builder = BatchBuilder(block_size, runner.device)
        self.sampled = torch.full((64,), -1)
        self.rows = 0

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> Computed:
        pending = [chunk.sequence for chunk in chunks if chunk.start >= len(chunk.sequence.tokens)]
        for sequence in pending:
            sequence.tokens.append(max(0, int(self.sampled[sequence.sampled_row])))
        batch = self.builder.build(chunks)
        for sequence in pending:
            sequence.tokens.pop()
        self.rows += len(batch.ids)
        self.sampled.fill_(-1)
        decoder, spans = self.runner.decoder, spans_to_score(chunks)
        hidden = decoder.hidden(batch, self.runner.kv_cache, self.runner.pool.tensors)
        scores = score(decoder, hidden, spans) if spans else None
        rows = rows_to_pool(chunks)
        pooled = pool(decoder, hidden, rows) if rows else None
        return Computed(decoder.logits(hidden, batch.logit_rows), None, None, scores, pooled)

    def remember(self, tokens: Tensor) -> None:
        self.sampled[: len(tokens)] = tokens


Make = Callable[..., Engine]


def make_engine(model: Path, ahead: bool = True, **options: object) -> Engine:
    """An engine on the CPU, whose host is one step ahead or not."""
    config = EngineConfig(str(model), **{**CPU, **options})  # type: ignore[arg-type]
    made = Engine.from_config(config)
    if ahead:
        made.runner.steps = DelayedSteps(made.runner, config.block_size)
    return made
