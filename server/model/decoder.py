"""The decoder: one class for all Llama-like families."""

from collections.abc import Mapping as ReadOnlyDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kernels.ops import Attention as AttentionLayout
from kernels.ops import Mapping, Ops, select_ops
from kernels.summands import Summands
from server.model.config import ModelConfig
from server.model.layers import Attention, FeedForward, RotaryEmbedding
from server.model.lora import LayerRouter, LoraContext
from server.model.weights import LayerWeights, ModelWeights, load_weights

KvCache = Sequence[tuple[Tensor, Tensor]]
Pages = ReadOnlyDict[str, tuple[Tensor, Tensor]]


class LayerObserver(Protocol):
    """Sees the hidden states of some rows before each of the first `depth` layers. rows: int64[R]."""

    rows: Tensor
    depth: int

    def observe(self, layer: int, hidden: Tensor) -> None:
        """hidden [R, hidden], in the model's dtype."""
        ...


@dataclass
class ForwardBatch:
    """One step of T tokens.

    ids, positions: int64[T]. mappings: by target group name; None or absent where no row uses a page.
    logit_rows: int64[R], the rows whose logits are wanted.
    """

    ids: Tensor
    positions: Tensor
    attention: AttentionLayout
    mappings: ReadOnlyDict[str, Mapping | None]
    logit_rows: Tensor
    router: LayerRouter | None = None
    observer: LayerObserver | None = None


class Hidden(NamedTuple):
    """Of T rows, what the last layer gave and the residual stream beside it, all [T, hidden]."""

    x: Summands
    residual: Tensor


class DecoderLayer:
    """Norm, attention, norm, feed-forward network; the residual stream travels beside the layers' outputs."""

    def __init__(self, config: ModelConfig, layer: int, weights: LayerWeights, ops: Ops) -> None:
        self.attention = Attention(config, layer, weights, ops)
        self.feed_forward = FeedForward(config, weights, ops)
        self.input_norm = weights.input_norm
        self.post_attention_norm = weights.post_attention_norm
        self.eps = config.norm_eps
        self.ops = ops

    def __call__(
        self,
        x: Summands,
        residual: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        meta: AttentionLayout,
        lora: LoraContext,
    ) -> tuple[Summands, Tensor]:
        """(x, residual) before the layer -> after it, all [T, hidden]; their sum is the hidden state."""
        if residual is None:
            residual = x[0]
            normed = self.ops.rms_norm(residual, self.input_norm, self.eps)
        else:
            normed, residual = self.ops.rms_norm_residual(x, residual, self.input_norm, self.eps)
        x = self.attention(normed, rotary, cache, meta, lora)
        normed, residual = self.ops.rms_norm_residual(x, residual, self.post_attention_norm, self.eps)
        return self.feed_forward(normed, lora), residual


class Decoder:
    """A Llama-like causal language model over a paged cache."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, ops: Ops) -> None:
        """Takes the layers out of `weights` one by one, so that copies in the backend's layout replace them."""
        self.config = config
        self.ops = ops
        self.embedding = weights.embedding
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        self.layers = [DecoderLayer(config, i, weights.layers.pop(0), ops) for i in range(config.num_layers)]
        self.norm = weights.norm
        self.lm_head = ops.pack_linear(weights.lm_head)
        self.rotary = RotaryEmbedding(config, self.device, self.dtype)

    @classmethod
    def from_folder(
        cls, path: str | Path, device: torch.device, dtype: torch.dtype, ops: Ops | None = None
    ) -> "Decoder":
        """Load a Hugging Face folder; `ops` defaults to the device's backend. Raises ModelError."""
        config = ModelConfig.from_folder(path)
        return cls(config, load_weights(path, config, device, dtype), ops or select_ops(device))

    def forward(
        self,
        batch: ForwardBatch,
        kv_cache: KvCache,
        pages: Pages,
    ) -> Tensor:
        """Logits [R, vocab] of the batch's `logit_rows`. Arguments as for `hidden`."""
        return self.logits(self.hidden(batch, kv_cache, pages), batch.logit_rows)

    def hidden(
        self,
        batch: ForwardBatch,
        kv_cache: KvCache,
        pages: Pages,
    ) -> Hidden:
        """All layers. Writes the new tokens' keys and values into `kv_cache`.

        kv_cache: per layer (k, v), each [blocks, block_size, kv heads, head_dim].
        pages: by group name (a [layers, pages, S * 16, in], b [layers, pages, 16, out]), for groups with a mapping.
        """
        meta = batch.attention
        rotary = self.rotary(batch.positions, meta.longest)
        x: Summands = functional.embedding(batch.ids, self.embedding), None
        residual = None
        observer = batch.observer
        for layer, cache, lora in zip(self.layers, kv_cache, self._lora(batch, pages), strict=True):
            if observer is not None and lora.layer < observer.depth:
                observer.observe(lora.layer, hidden_states(x, residual, observer.rows))
            x, residual = layer(x, residual, rotary, cache, meta, lora)
        if residual is None:
            raise ValueError("the model has no layers")
        return Hidden(x, residual)

    def logits(self, hidden: Hidden, rows: Tensor) -> Tensor:
        """[R, vocab] in the model's dtype, of the rows int64[R] of the hidden state."""
        return self.ops.linear(self.last_states(hidden, rows), self.lm_head, None)

    def last_states(self, hidden: Hidden, rows: Tensor) -> Tensor:
        """[R, hidden] in the model's dtype: the rows int64[R] behind the last norm."""
        (y, delta), residual = hidden
        last = y.index_select(0, rows), None if delta is None else delta.index_select(0, rows)
        normed, _ = self.ops.rms_norm_residual(last, residual.index_select(0, rows), self.norm, self.config.norm_eps)
        return normed

    def context(self, batch: ForwardBatch, pages: Pages, layer: int) -> LoraContext:
        """What one layer alone needs of a batch."""
        mappings = {name: mapping for name, mapping in batch.mappings.items() if mapping is not None}
        own = {name: (pages[name][0][layer], pages[name][1][layer]) for name in mappings}
        return LoraContext(layer, mappings, own, batch.router)

    def _lora(self, batch: ForwardBatch, pages: Pages) -> list[LoraContext]:
        """One context a layer; unbinding all layers at once spares two calls a group and layer."""
        mappings = {name: mapping for name, mapping in batch.mappings.items() if mapping is not None}
        split = {name: list(zip(*(part.unbind() for part in pages[name]), strict=True)) for name in mappings}
        return [
            LoraContext(i, mappings, {name: layers[i] for name, layers in split.items()}, batch.router)
            for i in range(len(self.layers))
        ]


def hidden_states(x: Summands, residual: Tensor | None, rows: Tensor | None) -> Tensor:
    """[R, hidden]: of these rows, None for all, the sum that `DecoderLayer` takes in two parts, rounded as its norm
    does. A copy.
    """

    def own(part: Tensor) -> Tensor:
        return part if rows is None else part.index_select(0, rows)

    states = own(x[0]).clone() if rows is None else own(x[0])
    if x[1] is not None:
        states += own(x[1])
    if residual is not None:
        states += own(residual)
    return states
