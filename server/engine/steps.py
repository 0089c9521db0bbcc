"""How a step runs on a device: on a CPU as it comes, on a GPU from captured graphs with the host one step ahead."""

from collections.abc import Mapping as ReadOnlyDict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from server.engine.batch import BatchBuilder
from server.engine.plan import Chunk
from server.model.decoder import Decoder

KvCache = Sequence[tuple[Tensor, Tensor]]
Pages = ReadOnlyDict[str, tuple[Tensor, Tensor]]


class Steps(Protocol):
    """Runs steps in order. `lookahead`: a step may be launched before the tokens of the one before it are known."""

    lookahead: bool

    def launch(self, chunks: list[Chunk]) -> tuple[Tensor, Tensor | None]:
        """Logits [R, vocab] of the chunks that yield a token, and their most likely tokens if these are known too."""
        ...

    def remember(self, tokens: Tensor) -> None:
        """int64[R]: the tokens chosen from the logits of the last launch, for a launch that looks ahead."""
        ...


class EagerSteps:
    """Builds each step's tensors and runs the model on them."""

    lookahead = False

    def __init__(self, decoder: Decoder, kv_cache: KvCache, pages: Pages, block_size: int) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.pages = pages
        self._builder = BatchBuilder(block_size, decoder.device)

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk]) -> tuple[Tensor, Tensor | None]:
        return self.decoder.forward(self._builder.build(chunks), self.kv_cache, self.pages), None

    def remember(self, tokens: Tensor) -> None:
        """The host knows all tokens before the next launch."""
