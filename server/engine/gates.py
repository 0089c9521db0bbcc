"""Token-level routers as the engine sees them: what a request wants of one, and what a step gives it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from adapters_store.types import LinearShape
from server.model.lora import LayerRouter

if TYPE_CHECKING:
    from server.engine.gate_stage import GateViews


@dataclass(frozen=True)
class GateUse:
    """A token-level router and how one request uses it.

    `path` is the folder of its gates, `digest` identifies what is in there. `rows`: the adapter of each row of the
    gates, None where the request may not use it. `null`: one more row stands for no adapter. Every token uses its
    `top_k` adapters of highest logit, weighted by the softmax of these logits over `temperature`.
    """

    digest: str
    path: str
    rows: tuple[str | None, ...]
    top_k: int
    temperature: float
    null: bool = False

    @property
    def allowed(self) -> tuple[bool, ...]:
        """Which rows may be chosen."""
        return (*(row is not None for row in self.rows), *((True,) if self.null else ()))

    @cached_property
    def key(self) -> bytes:
        """sha256 over all that changes the forward pass."""
        parts = [self.digest, self.rows, self.top_k, float(self.temperature).hex(), self.null]
        return hashlib.sha256(json.dumps(parts).encode()).digest()


class Gates(Protocol):
    """One router's gates. `num_rows` a linear; bit i of `targets`: whether there are any for TARGETS[i]."""

    num_rows: int
    targets: int


@dataclass(frozen=True)
class GateShape:
    """Room for the gates of `slots` routers at a time, each with up to `gates` of them a linear."""

    slots: int
    gates: int

    def num_bytes(self, shape: LinearShape, itemsize: int) -> int:
        return self.slots * self.gates * shape.num_layers * sum(shape.inputs.values()) * itemsize


@dataclass(frozen=True)
class GatePart:
    """The token rows of one step that use the same gates: R of them, n rows in the gates.

    count: R. rows: int64[R], sorted; None for all rows of the step. allowed: bool[R, n], None if all may be chosen.
    top_k: int64[R], the largest of them is `most`, None if it is all of them. temperature: fp32[R], None for 1.
    owners: by group name fp32[n, U], 1 where a column of the mapping is a page of that row's adapter.
    touched: by group name bool[R], whether any adapter that the row may use acts there, None for all rows.
    """

    gates: Gates
    count: int
    rows: Tensor | None
    allowed: Tensor | None
    top_k: Tensor | None
    temperature: Tensor | None
    most: int
    owners: Mapping[str, Tensor]
    touched: Mapping[str, Tensor | None]


class StepRouter(LayerRouter, Protocol):
    """Routes the rows of one step."""

    def totals(self) -> Sequence[Tensor]:
        """After the step, for each part fp32[R, n]: the weights of the gates' rows, summed over the gates in groups
        that the token row's adapters touch.
        """
        ...


@dataclass(frozen=True)
class Shares:
    """How much the rows of gates counted for tokens, by chunk of a step.

    totals: fp32[any, any], the weights summed over gates. places: by chunk the tensor, its row, and how many columns of
    it are rows of the gates; None for chunks without.
    """

    totals: Sequence[Tensor]
    places: Sequence[tuple[int, int, int] | None]

    def to_host(self) -> "Shares":
        """On its way to the host, behind all work that was launched before."""
        return Shares([total.to("cpu", non_blocking=True) for total in self.totals], self.places)

    def read(self) -> list[tuple[float, ...]]:
        """`Output.shares` by chunk, from tensors on the host."""
        sums = [total.numpy() for total in self.totals]
        found: list[tuple[float, ...]] = []
        for place in self.places:
            if place is None:
                found.append(())
                continue
            number, row, count = place
            own = sums[number][row, :count]
            found.append(tuple((own / max(own.sum(), 1.0)).tolist()))
        return found


class SlotMemory(Protocol):
    """Gates of several routers at fixed addresses on the device."""

    shape: GateShape

    @property
    def num_bytes(self) -> int: ...

    def load(self, slot: int, gates: Gates) -> None:
        """Put gates that `read_for_slots` gave into a slot, behind all steps that were launched."""
        ...

    def router(self, views: "GateViews") -> LayerRouter:
        """Routes the rows of steps that are captured or launched with it, by what the staged views then say."""
        ...


class GateFactory(Protocol):
    """Makes gates and routers for one model on one device."""

    def read(self, path: str) -> Gates:
        """The gates in a folder, on the device; may be called from any thread. Raises ValueError, OSError."""
        ...

    def read_for_slots(self, path: str) -> Gates:
        """As `read`, on the host."""
        ...

    def random(self, num_rows: int, path: str) -> Gates:
        """Gates for measuring, as `read_for_slots` gives them; those of one path are always the same."""
        ...

    def router(self, parts: Sequence[GatePart]) -> StepRouter: ...

    def slots(self, shape: GateShape) -> SlotMemory: ...


def gate_factory(name: str, shape: LinearShape, device: torch.device, dtype: torch.dtype) -> GateFactory:
    """The factory that `name`, "module:class", stands for: the engine knows no kind of router by itself."""
    factory: GateFactory = load_class(name)(shape, device, dtype)
    return factory


def load_class(name: str) -> type:
    """The class that `name`, "module:class", stands for."""
    module, _, attribute = name.partition(":")
    found: type = getattr(import_module(module), attribute)
    return found
