"""Prompts that a router decides for layer by layer, each with what was chosen for the layers before already in use."""

from collections.abc import Mapping
from collections.abc import Sequence as List

import torch
from torch import Tensor

from adapters_store.types import GROUPS
from kernels.ops import Mapping as PageMapping
from server.engine.decided_rows import PLACES
from server.engine.gate_parts import Columns
from server.engine.plan import Chunk, LayerRun
from server.engine.prompt_reading import started
from server.engine.prompt_routers import Verdict
from server.engine.sequence import Sequence
from server.model.decoder import Decoder, ForwardBatch, KvCache, Pages
from server.model.layer_major import LayerMajor


class LayerWeights:
    """Scales the adapters of one prompt by what its router has just chosen for a layer.

    owners: by group name fp32[R, U], 1 where a column of the mapping is a page of the row's adapter.
    """

    def __init__(self, owners: Mapping[str, Tensor]) -> None:
        self._owners = owners
        self.weights: Tensor | None = None  # fp32[7, R] of the layer at hand

    def scale(self, layer: int, group: str, x: Tensor, mapping: PageMapping) -> Tensor:  # noqa: ARG002
        """fp32[S, T, U], the same for all rows."""
        assert self.weights is not None, "nothing was decided for this layer"
        factors = self.weights[PLACES[group]] @ self._owners[group]
        return factors[:, None].expand(-1, len(x), -1)


class LayeredPrompt:
    """A prompt between two of its layers. It writes keys and values into blocks that its sequence holds."""

    def __init__(self, sequence: Sequence, decoder: Decoder, parts: List[tuple[ForwardBatch, Columns]]) -> None:
        """parts: the prompt's batches, in order, and the pages of their mappings' columns."""
        self._reading = started(sequence)
        self._routers = []
        for batch, columns in parts:
            router = LayerWeights(_owners(sequence, columns, decoder.device))
            batch.router = router
            self._routers.append(router)
        self._layers = LayerMajor(decoder, [batch for batch, _ in parts])

    @torch.inference_mode()
    def run(self, layers: LayerRun, kv_cache: KvCache, pages: Pages) -> Verdict | None:
        """Some layers more; the verdict, if these were the last."""
        if layers.start != self._layers.next_layer:
            raise RuntimeError(f"layer {layers.start} is asked for, but {self._layers.next_layer} is the next")
        for _ in range(layers.count):
            self._layers.run(kv_cache, pages, self._reading.read, self._decide)
        return self._reading.verdict() if layers.finishes else None

    def _decide(self, layer: int) -> None:
        weights = self._reading.weights(layer)
        for router in self._routers:
            router.weights = weights


def prompt_parts(sequence: Sequence, size: int) -> list[Chunk]:
    """The whole prompt as chunks of at most `size` tokens, none of which yields a token."""
    count = sequence.num_prompt
    return [Chunk(sequence, start, min(size, count - start), samples=False) for start in range(0, count, size)]


def _owners(sequence: Sequence, columns: Columns, device: torch.device) -> dict[str, Tensor]:
    use, lease = sequence.asked.prompt_router, sequence.lease
    assert use is not None
    assert lease is not None, "a layered prompt runs with all its adapters"
    owners = {}
    for group in (group.name for group in GROUPS if group.name in columns):
        own = torch.zeros(len(use.rows), len(columns[group]))
        column_of = {page: column for column, page in enumerate(columns[group]) if page >= 0}
        pages = dict(lease.by_key(group))
        for row, digest in enumerate(use.rows):
            for page in pages.get(digest or "", ()):
                if page in column_of:  # else its adapter's scale is 0
                    own[row, column_of[page]] = 1.0
        owners[group] = own.to(device)
    return owners
