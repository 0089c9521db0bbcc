"""A prompt layer by layer: all of it through one before the next, so that a layer may depend on all its tokens."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional

from kernels.summands import Summands
from server.model.decoder import Decoder, ForwardBatch, KvCache, Pages, hidden_states

Read = Callable[[int, Tensor], None]


class LayerMajor:
    """A prompt in parts of consecutive tokens, on their way through the layers together.

    Between layers all that is kept of T tokens is their hidden state, as two tensors [T, hidden].
    """

    def __init__(self, decoder: Decoder, parts: Sequence[ForwardBatch]) -> None:
        self.next_layer = 0
        self._decoder = decoder
        self._parts = parts
        self._states: list[tuple[Summands, Tensor | None]] = [
            ((functional.embedding(part.ids, decoder.embedding), None), None) for part in parts
        ]
        self._rotary = [decoder.rotary(part.positions, part.attention.longest) for part in parts]

    def run(self, kv_cache: KvCache, pages: Pages, read: Read, decide: Callable[[int], None]) -> None:
        """One layer. `read` gets its number and the states [T, hidden] before it, part by part. After `decide` the
        parts' routers may weigh the layer's adapters. Arguments as for `Decoder.hidden`.
        """
        layer = self.next_layer
        for x, residual in self._states:
            read(layer, hidden_states(x, residual, None))
        decide(layer)
        for number, part in enumerate(self._parts):
            x, residual = self._states[number]
            context = self._decoder.context(part, pages, layer)
            block = self._decoder.layers[layer]
            self._states[number] = block(x, residual, self._rotary[number], kv_cache[layer], part.attention, context)
        self.next_layer += 1
