"""An encoder's forward passes on a GPU, from captured CUDA graphs.

Processes take turns on a GPU by slices of time. Beside an engine that always has work, a pass of a hundred launches
may wait for many turns, one that is a single launch waits for one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (32, 64, 128, 256)
"""Texts and tokens of a pass are padded to these. Larger ones run without a graph."""
MOST_DIFFERENT = 1e-3
"""Of the cosine, between a pass from a graph and the same one without: else the encoder does without graphs."""

Size = tuple[int, int]


@dataclass(frozen=True)
class Captured:
    """One graph, the tensors (rows, tokens) that it reads, the page-locked ones that are filled for them, what else the
    encoder was told, and the output (rows, width).
    """

    graph: torch.cuda.CUDAGraph
    inputs: Mapping[str, Tensor]
    staged: Mapping[str, Tensor]
    others: Mapping[str, Any]
    output: Tensor


class EncoderGraphs:
    """Graphs of one SentenceTransformer, whose weights stay where they are; captured when a size first comes.

    Each is compared with the pass without a graph before it is used, so whatever an encoder does that a graph cannot
    hold (a look at the values, another kind of padding) costs speed alone.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._graphs: dict[Size, Captured | None] = {}
        self._pool: Any = None
        self._stream: Any = None

    @property
    def num_graphs(self) -> int:
        return sum(captured is not None for captured in self._graphs.values())

    def embed(self, features: Mapping[str, Any]) -> Tensor | None:
        """The embeddings (n, width) of tokenised texts, which lie on the CPU. None if the pass needs to do without.

        They are valid until the next call.
        """
        tensors, others = _split(features)
        rows, length = tensors["input_ids"].shape
        size = _size(rows, length)
        if size is None or any(tensor.shape != (rows, length) for tensor in tensors.values()):
            return None
        if size not in self._graphs:
            self._graphs[size] = self._try(size, tensors, others)
        captured = self._graphs[size]
        if captured is None or captured.inputs.keys() != tensors.keys() or captured.others != others:
            return None
        self._stage(captured.staged, captured.inputs, tensors)
        captured.graph.replay()
        return captured.output[:rows]

    def _try(self, size: Size, tensors: Mapping[str, Tensor], others: dict[str, Any]) -> Captured | None:
        import torch

        try:
            captured = self._capture(size, tensors, others)
            given = {name: tensor.to(self._model.device) for name, tensor in tensors.items()}
            expected = self._model(given | others)["sentence_embedding"].float()
            captured.graph.replay()
            alike = float(torch.cosine_similarity(captured.output[: len(expected)].float(), expected).min())
            if alike >= 1 - MOST_DIFFERENT:  # not so for NaN as well
                return captured
            reason = f"it gives other embeddings than a pass without a graph, cosine {alike:.3g}"
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
        logger.warning("passes of %d texts of %d tokens run without a graph: %s", *size, reason)
        return None

    def _capture(self, size: Size, tensors: Mapping[str, Tensor], others: dict[str, Any]) -> Captured:
        import torch

        device, pinned = self._model.device, torch.cuda.is_available()
        staged = {name: torch.empty(size, dtype=each.dtype, pin_memory=pinned) for name, each in tensors.items()}
        inputs = {name: torch.empty(size, dtype=each.dtype, device=device) for name, each in tensors.items()}
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        stream = self._stream = self._stream or torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            self._stage(staged, inputs, tensors)
            self._model(inputs | others)  # libraries take their memory outside the capture
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = self._model(inputs | others)["sentence_embedding"]
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return Captured(graph, inputs, staged, others, output)

    def _stage(self, staged: Mapping[str, Tensor], inputs: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Tokens that are not there come last, so that no other changes its place, and are masked; texts that are not
        there are the first once more.
        """
        pad = self._model.tokenizer.pad_token_id
        for name, tensor in tensors.items():
            rows, length = tensor.shape
            host = staged[name]
            host.fill_(pad if name == "input_ids" else 0)
            host[:rows, :length] = tensor
            host[rows:] = host[0]
            inputs[name].copy_(host, non_blocking=True)


def _size(rows: int, length: int) -> Size | None:
    """The smallest that holds so many texts of so many tokens."""
    fitting = [next((size for size in sizes if size >= of), None) for sizes, of in ((ROWS, rows), (LENGTHS, length))]
    return None if None in fitting else (fitting[0] or 0, fitting[1] or 0)


def _split(features: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    import torch

    tensors = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in features.items() if name not in tensors}
