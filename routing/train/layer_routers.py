"""Prompt-level routers inside a model of `transformers`, for training: they read, and may decide, layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapters_store.linear_names import Module, module_path
from adapters_store.types import TARGETS, LoraPair
from routing.prompt_router import (
    ATTENTION,
    GELU_A,
    GELU_B,
    RATIONAL,
    LayerRouter,
    RouterForm,
    expert_weights,
    pool_rows,
    top_experts,
)
from routing.train.side_by_side import SideBySide


class RoutedLinear(torch.nn.Module):
    """base(x) + sum_i w_i s_i B_i A_i x, w (rows, experts) as it stands in `routers` when a layer is computed."""

    def __init__(
        self,
        base: torch.nn.Linear,
        pairs: Mapping[int, LoraPair],
        experts: int,
        routers: LayerRouters,
        *,
        trainable: bool,
    ) -> None:
        super().__init__()
        self.base = base
        self.experts = SideBySide(pairs, experts, base.weight, trainable=trainable)
        self._weights = routers.acting  # not the routers: they hold the layers, which hold this

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, T, in) to (rows, T, out)."""
        y: Tensor = self.base(x)
        if not self._weights or not len(self.experts.a):
            return y
        delta: Tensor = self.experts(x, self._weights[0][:, None])
        return y + delta


class LayerRouters:
    """The routers of all layers, and what they say in one forward pass.

    `acting` holds the weights (rows, experts) that the linears of the layer now computed use; empty, nothing acts.
    """

    def __init__(self, form: RouterForm, routers: Sequence[LayerRouter], layers: Sequence[torch.nn.Module]) -> None:
        self.form = form
        self.routers = tuple(routers)
        self.acting: list[Tensor] = []
        self._prompts: Tensor | None = None
        self._decides = False
        self._logits: list[Tensor] = []
        for layer, module in enumerate(layers):
            module.register_forward_pre_hook(self._hook(layer), with_kwargs=True)

    @contextlib.contextmanager
    def reading(self, prompts: Tensor, *, decides: bool) -> Iterator[None]:
        """Around one forward pass, of rows whose prompts are true in (rows, longest) bool.

        decides: every layer's linears use what its router chose; else no adapter acts. A chosen expert's weight is
        w (1 + p - stopgrad(p)): its value is that of serving, its gradient reaches the probability.
        """
        self._prompts, self._decides, self._logits = prompts, decides, []
        try:
            yield
        finally:
            self._prompts = None
            self.acting.clear()

    @contextlib.contextmanager
    def forced(self, weights: Tensor) -> Iterator[None]:
        """Around one forward pass: all layers use these weights (rows, experts), and no router is asked."""
        self.acting[:] = [weights]
        try:
            yield
        finally:
            self.acting.clear()

    @property
    def logits(self) -> Tensor:
        """Of the last pass that was read: (rows, layers, experts) fp32."""
        return torch.stack(self._logits, dim=1)

    def _hook(self, layer: int) -> Any:
        router, form = self.routers[layer], self.form

        def decide(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._prompts is None:
                return
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            with torch.autocast(hidden.device.type, enabled=False):  # routers are fp32, as they are served
                logits = router.logits(pool_rows(hidden, self._prompts, form.pooling, form.norm, router.w_sa))
            self._logits.append(logits)
            if self._decides:
                shares, chosen = top_experts(logits, form.top_k)
                self.acting[:] = [expert_weights(chosen, form.experts) * (1 + shares - shares.detach())]

        return decide


def fresh_routers(form: RouterForm, width: int, device: str, spread: float, seed: int) -> tuple[LayerRouter, ...]:
    """Trainable routers: matrices normal with this standard deviation, attention even, rationals GeLU.

    With fixed pooling and no activation the cross-entropy is convex in the matrix, and a spread of 0 a good start;
    routers that only choose need one, because equal experts would learn alike.
    """
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device

    def made(values: Tensor) -> torch.nn.Parameter:
        return torch.nn.Parameter(values.to(device))

    rational = form.activation == RATIONAL
    return tuple(
        LayerRouter(
            made(spread * torch.randn(form.num_experts, width, generator=generator)),
            made(torch.zeros(width)) if form.pooling == ATTENTION else None,
            made(torch.tensor(GELU_A)) if rational else None,
            made(torch.tensor(GELU_B)) if rational else None,
        )
        for _ in range(form.num_layers)
    )


def router_weights(routers: Sequence[LayerRouter]) -> dict[str, torch.nn.Parameter]:
    """Of trainable routers, by layer and name."""
    found: dict[str, torch.nn.Parameter] = {}
    for layer, router in enumerate(routers):
        for name in ("w", "w_sa", "a", "b"):
            weight = getattr(router, name)
            if isinstance(weight, torch.nn.Parameter):
                found[f"layers.{layer}.{name}"] = weight
    return found


def embed_experts(
    causal: torch.nn.Module,
    pairs: Mapping[Module, Mapping[int, LoraPair]],
    experts: int,
    routers: LayerRouters,
    *,
    trainable: bool,
) -> dict[Module, RoutedLinear]:
    """Replaces the linears that experts act on, by (layer, target)."""
    linears: dict[Module, RoutedLinear] = {}
    for layer, target in sorted(pairs, key=lambda module: (module[0], TARGETS.index(module[1]))):
        base = causal.get_submodule(module_path(layer, target))
        assert isinstance(base, torch.nn.Linear)
        routed = RoutedLinear(base, pairs[layer, target], experts, routers, trainable=trainable)
        linears[layer, target] = routed
        causal.set_submodule(module_path(layer, target), routed)
    return linears
