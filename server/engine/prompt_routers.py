"""Prompt-level routers as the engine sees them: what a request wants of one, and how it decides for a prompt."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from adapters_store.types import LinearShape
from server.engine.gates import load_class


@dataclass(frozen=True)
class PromptUse:
    """A prompt-level router and how one request uses it.

    `path` is the router's folder, `digest` identifies what is in there. `rows`: the adapters that it was trained with,
    None where the request may not use one. With `layered` what was chosen for the layers before acts already while a
    layer chooses; else the router reads the base model. `top_k`: how many experts a layer uses.
    """

    digest: str
    path: str
    rows: tuple[str | None, ...]
    layered: bool
    top_k: int

    @cached_property
    def key(self) -> bytes:
        """sha256 over all that the decision depends on beside the prompt."""
        parts = [self.digest, self.rows, self.layered, self.top_k]
        return hashlib.sha256(json.dumps(parts).encode()).digest()


class Verdict(NamedTuple):
    """What a router says of one prompt, in a model of L layers with R adapters and E experts.

    weights: fp32[L, 7, R], by target in the order of `TARGETS` the factor of every adapter. chosen: bool[L, E].
    probabilities: fp32[D, E] for the layers that it read, NaN if it cannot decide. An expert is an adapter or a target.
    """

    weights: Tensor
    chosen: Tensor
    probabilities: Tensor

    def to_host(self) -> "Verdict":
        """Copies under way to the host."""
        return Verdict(*(part.to("cpu", non_blocking=True) for part in self))


class PromptPass(Protocol):
    """One prompt on its way through the layers."""

    def read(self, layer: int, hidden: Tensor) -> None:
        """hidden [n, d]: the states before a layer of the prompt's next n tokens; layers may be read alternately."""
        ...

    def weights(self, layer: int) -> Tensor:
        """fp32[7, R] for a layer before which the whole prompt has been read."""
        ...

    def verdict(self) -> Verdict:
        """When all has been read; on the device."""
        ...


class PromptRouter(Protocol):
    """One router on the device.

    num_rows: adapters that it was trained with. depth: it reads the states before so many layers from the first on, of
    a `layered` one all. last_only: the states of the prompt's last token are all that it needs.
    """

    @property
    def num_rows(self) -> int: ...

    @property
    def layered(self) -> bool: ...

    @property
    def depth(self) -> int: ...

    @property
    def last_only(self) -> bool: ...

    def start(self, use: PromptUse) -> PromptPass: ...


class PromptRouterFactory(Protocol):
    """Reads routers for one model on one device."""

    def read(self, path: str) -> PromptRouter:
        """The router in a folder; may be called from any thread. Raises ValueError, OSError."""
        ...


def prompt_router_factory(
    name: str, shape: LinearShape, device: torch.device, dtype: torch.dtype
) -> PromptRouterFactory:
    """The factory that `name`, "module:class", stands for."""
    factory: PromptRouterFactory = load_class(name)(shape, device, dtype)
    return factory


@dataclass(frozen=True)
class Decided:
    """A decision as clients are told.

    chosen: by layer the experts that act there. probabilities: by layer that was read, of every expert. `seconds`: from
    the prompt's first step until it was known; 0 if it was `cached`.
    """

    chosen: tuple[tuple[int, ...], ...]
    probabilities: tuple[tuple[float, ...], ...]
    seconds: float
    cached: bool = False
