"""Prompt-level routers as methods of an evaluation: MoA and MiLoRA, over given adapters or with those trained along."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from adapters_store.types import LinearShape, Mix
from routing.evaluate.answers import AdapterFolders
from routing.evaluate.gate_methods import GateMethod, OwnAdapters, check_adapters
from routing.prompt_folder import PromptCard, load_prompt_router
from routing.prompt_router import MODULES, LayerRouter, rational
from server.engine.prompt_routers import PromptUse

CURVE = tuple(step / 4 for step in range(-16, 17))
"""Where a learned activation is drawn."""


@dataclass(frozen=True)
class EvaluatedPromptRouter:
    """A router under the label that the tables have for it; `curves` are its activations at `CURVE`, by layer."""

    label: str
    folder: Path
    card: PromptCard
    curves: tuple[tuple[float, ...], ...] = ()

    @property
    def own(self) -> OwnAdapters:
        return OwnAdapters(self.label, self.folder, tuple(adapter.name for adapter in self.card.adapters))


def read_prompt(label: str, folder: Path, shape: LinearShape, fingerprint: str) -> EvaluatedPromptRouter:
    """Raises RouterFolderError for a router of another model."""
    card, router = load_prompt_router(folder, shape, fingerprint)
    curves = tuple(curve for layer in router.layers if (curve := _curve(layer)))
    return EvaluatedPromptRouter(label, folder, card, curves)


def _curve(layer: LayerRouter) -> tuple[float, ...]:
    if layer.a is None or layer.b is None:
        return ()
    values: list[float] = rational(torch.tensor(CURVE), layer.a, layer.b).tolist()
    return tuple(values)


def check_prompt(router: EvaluatedPromptRouter, folders: AdapterFolders, shape: LinearShape) -> None:
    """Raises AnswerError where an adapter is missing, or is not the one that the router was trained for."""
    names = {router.own.name(adapter.name): adapter.digest for adapter in router.card.adapters}
    check_adapters(router.label, names, folders, shape)


def prompt_methods(
    router: EvaluatedPromptRouter, digests: Mapping[str, str], modules: Sequence[int] = ()
) -> list[GateMethod]:
    """The router as it was trained; over modules also with each number of `modules` of a layer in place of its own."""
    form, card = router.card.form, router.card
    rows = tuple(digests[router.own.name(adapter.name)] for adapter in card.adapters)
    parts = [card.sha256, repr(form), repr(card.has_null), *rows]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    counts = {router.label: form.top_k}
    if form.experts == MODULES:
        counts |= {f"{router.label}, k = {count}": count for count in modules if count <= form.num_experts}
    places = {} if form.experts == MODULES else {each.name: place for place, each in enumerate(card.adapters)}
    mix = Mix(tuple((row, 1.0) for row in sorted(rows)))
    return [
        GateMethod(
            name, mix, rows=places, prompt_router=PromptUse(digest, str(router.folder), rows, form.layered, count)
        )
        for name, count in counts.items()
    ]
