"""Prompt-level routers as an engine uses them: read for its model, and reading one prompt after the other."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from adapters_store.types import TARGETS, LinearShape
from routing.card_file import RouterFolderError
from routing.prompt_folder import PromptCard, load_prompt_router
from routing.prompt_router import LAST, MODULES, PromptPool, PromptRouter, choose, expert_weights, top_experts
from server.engine.prompt_routers import PromptUse, Verdict


class ServedPromptRouter:
    """One router on a device; see `server.engine.prompt_routers.PromptRouter`."""

    def __init__(self, card: PromptCard, router: PromptRouter, device: torch.device) -> None:
        self.num_rows = len(card.adapters)
        self.layered = card.form.layered
        self.depth = card.form.num_counted
        self.last_only = card.form.pooling == LAST and not card.form.layered
        self.router = router.to(device)
        self.device = device

    def start(self, use: PromptUse) -> "PromptReading":
        """For a new prompt."""
        return PromptReading(self, use)


class PromptReading:
    """One prompt before one router; see `server.engine.prompt_routers.PromptPass`.

    An adapter that the request may not use takes no probability and no vote, and is not chosen. The row for no adapter,
    where there is one, may always be.
    """

    def __init__(self, served: ServedPromptRouter, use: PromptUse) -> None:
        form = served.router.form
        self._layers = served.router.layers
        self._form = replace(form, top_k=min(use.top_k, form.num_experts))
        self._pools: list[PromptPool] = [served.router.pool(layer) for layer in range(served.depth)]
        self._num_rows = served.num_rows
        self._allowed: Tensor | None = None
        if form.experts != MODULES and None in use.rows:
            allowed = [row is not None for row in use.rows]
            allowed += [True] * (form.num_experts - len(allowed))
            self._allowed = torch.tensor(allowed, device=served.device)

    def read(self, layer: int, hidden: Tensor) -> None:
        """hidden [n, d]: the states before a layer of the prompt's next n tokens."""
        self._pools[layer].update(hidden)

    def weights(self, layer: int) -> Tensor:
        """fp32[7, R] of a router that decides by layer."""
        _, chosen = top_experts(self._logits(layer), self._form.top_k, self._allowed)
        return self._by_target(expert_weights(chosen, self._form.experts))

    def verdict(self) -> Verdict:
        """When the whole prompt has been read before all layers that count."""
        logits = torch.stack([self._logits(layer) for layer in range(len(self._pools))])
        choice = choose(logits, self._form, self._allowed)
        weights = self._by_target(expert_weights(choice.chosen, self._form.experts))
        return Verdict(weights, choice.chosen, choice.probabilities)

    def _logits(self, layer: int) -> Tensor:
        return self._layers[layer].logits(self._pools[layer].finish())

    def _by_target(self, weights: Tensor) -> Tensor:
        """fp32[..., 7, R] of the experts' weights [..., N]."""
        if self._form.experts == MODULES:
            return weights.unsqueeze(-1)
        return weights[..., None, : self._num_rows].expand(*weights.shape[:-1], len(TARGETS), -1)


class PromptRouterFactory:
    """Reads prompt-level routers for one model; see `server.engine.prompt_routers.PromptRouterFactory`."""

    def __init__(self, shape: LinearShape, device: torch.device, dtype: torch.dtype) -> None:  # noqa: ARG002
        self._shape = shape
        self._device = device

    def read(self, path: str) -> ServedPromptRouter:
        """Raises ValueError for a router that does not fit the model, OSError."""
        try:
            card, router = load_prompt_router(Path(path), self._shape)
        except RouterFolderError as error:
            raise ValueError(str(error)) from error
        return ServedPromptRouter(card, router, self._device)
