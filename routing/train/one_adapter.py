"""A model of `transformers` under one adapter at a time, whose linears show what they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from adapters_store.linear_names import Module, module_path
from adapters_store.types import AdapterWeights, LoraPair
from routing.train.batches import Example
from routing.train.mixed_batches import collate_mixed

Show = Callable[[Module, Tensor], None]
"""Told a linear, and its input (tokens, in) fp32 at all tokens that are not padding."""


@torch.no_grad()
def show_inputs(
    causal: Any,
    modules: Sequence[Module],
    weights: AdapterWeights | None,
    examples: Sequence[Example],
    pad_id: int,
    show: Show,
) -> Tensor:
    """One forward pass of the examples under the adapter, None for the base model.

    Returns where the next token belongs to an answer, (tokens) bool in the order of what `show` was told.
    """
    device = next(causal.parameters()).device
    batch = collate_mixed([((0, example),) for example in examples], pad_id, device)
    real = batch.mask.flatten().bool()

    def tell(module: Module, x: Tensor) -> None:
        show(module, x.flatten(0, -2)[real].float())

    with _adapted(causal, weights), _shown(causal, modules, tell):
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        with autocast:
            causal.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    return batch.answers.flatten()[real]


@contextmanager
def _adapted(causal: Any, weights: AdapterWeights | None) -> Iterator[None]:
    """While it lasts every linear that the adapter touches adds its update."""

    def adds(pair: LoraPair) -> Callable[..., Tensor]:
        def hook(linear: torch.nn.Linear, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            a, b = (factor.to(linear.weight.device, torch.float32) for factor in (pair.a, pair.b))
            delta = torch.nn.functional.linear(torch.nn.functional.linear(inputs[0], a), b)
            return y + pair.scale * delta

        return hook

    pairs = {} if weights is None else weights.pairs
    with _hooked(
        causal.get_submodule(module_path(*module)).register_forward_hook(adds(pair)) for module, pair in pairs.items()
    ):
        yield


@contextmanager
def _shown(causal: Any, modules: Sequence[Module], tell: Show) -> Iterator[None]:
    def tells(module: Module) -> Callable[..., None]:
        return lambda _, inputs: tell(module, inputs[0])

    with _hooked(
        causal.get_submodule(module_path(*module)).register_forward_pre_hook(tells(module)) for module in modules
    ):
        yield


@contextmanager
def _hooked(handles: Iterator[Any]) -> Iterator[None]:
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()
