"""Log-probabilities of a prompt's own tokens: each row of a prompt is asked how likely the token behind it was.

A request that wants them has every row of its prompt computed, so it takes nothing from the prefix cache that is not
scored yet. The logits of a chunk of a prompt are never there all at once: they are made, and reduced to a few numbers a
row, block by block on the device.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from server.engine.plan import Chunk
from server.engine.sampler import upload
from server.engine.sequence import TokenLogprobs
from server.model.decoder import Decoder, Hidden

SCORED_ROWS = 64
"""Rows whose logits are there at a time: with a vocabulary of 128,000, 98 MB with their copies in fp32."""


class Span(NamedTuple):
    """Rows of a step from `row` on, one for each of the prompt tokens `targets`, which follow them.

    `chunk` is the index of the chunk that they belong to, `most` the number of most likely tokens wanted beside.
    """

    chunk: int
    row: int
    targets: tuple[int, ...]
    most: int


def spans_to_score(chunks: list[Chunk]) -> list[Span]:
    """What a step that is about to be launched has to score: what no step before it did."""
    if not any(chunk.sequence.num_unscored for chunk in chunks):
        return []
    spans, row = [], 0
    for index, chunk in enumerate(chunks):
        sequence = chunk.sequence
        first = max(chunk.start, sequence.first_unscored)
        most = sequence.request.params.prompt_logprobs
        targets = sequence.request.prompt[first + 1 : chunk.stop + 1] if chunk.scores else ()
        if targets and most is not None:
            spans.append(Span(index, row + first - chunk.start, targets, most))
        row += chunk.num_tokens
    return spans


@dataclass(frozen=True)
class Scores:
    """Of the spans' rows one after the other: the token's log-probability fp32[N] and rank int64[N], and the values and
    ids of the most likely tokens [N, widest]."""

    spans: list[Span]
    logprobs: Tensor
    ranks: Tensor
    top: tuple[Tensor, Tensor]

    def to_host(self) -> "Scores":
        """Start the copies; their contents may be read when the stream has reached this point."""
        logprobs, ranks, values, ids = (
            part.to("cpu", non_blocking=True) for part in (self.logprobs, self.ranks, *self.top)
        )
        return Scores(self.spans, logprobs, ranks, (values, ids))

    def read(self) -> dict[int, tuple[TokenLogprobs, ...] | None]:
        """By index of the chunk; None where a row is not finite."""
        logprobs, ranks = self.logprobs.tolist(), self.ranks.tolist()
        values, ids = (part.tolist() for part in self.top)
        finite = self.logprobs.isfinite()
        read: dict[int, tuple[TokenLogprobs, ...] | None] = {}
        start = 0
        for span in self.spans:
            rows = range(start, start + len(span.targets))
            start = rows.stop
            read[span.chunk] = None
            if finite[rows.start : rows.stop].all():
                read[span.chunk] = tuple(
                    TokenLogprobs(
                        logprobs[row],
                        tuple(zip(ids[row][: span.most], values[row][: span.most], strict=True)),
                        ranks[row],
                    )
                    for row in rows
                )
        return read


@torch.inference_mode()
def score(decoder: Decoder, hidden: Hidden, spans: list[Span]) -> Scores:
    """Log-probabilities of the spans' targets in fp32, from the hidden state of the step's rows."""
    device = decoder.device
    rows = upload([row for s in spans for row in range(s.row, s.row + len(s.targets))], torch.int64, device)
    targets = upload([target for span in spans for target in span.targets], torch.int64, device)
    widest = min(max(span.most for span in spans), decoder.config.vocab_size)
    parts: list[tuple[Tensor, ...]] = []
    for block, wanted in zip(rows.split(SCORED_ROWS), targets.split(SCORED_ROWS), strict=True):
        logprobs = torch.log_softmax(decoder.logits(hidden, block).float(), dim=-1)
        chosen = logprobs.gather(1, wanted[:, None])
        ranks = (logprobs > chosen).sum(dim=-1) + 1
        parts.append((chosen[:, 0], ranks, *logprobs.topk(widest)))
    chosen, ranks, values, ids = (torch.cat(part) for part in zip(*parts, strict=True))
    return Scores(spans, chosen, ranks, (values, ids))
