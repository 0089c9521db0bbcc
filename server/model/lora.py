"""Linears that add the rows' LoRA updates, and the hook for routers that act inside the forward pass."""

from collections.abc import Mapping as ReadOnlyDict
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from adapters_store.types import TargetGroup
from kernels.gate_rows import Gated
from kernels.ops import Mapping, Ops
from kernels.summands import Summands


class LayerRouter(Protocol):
    """Scales the weights of a mapping, layer by layer, from the input of the linears."""

    def scale(self, layer: int, group: str, x: Tensor, mapping: Mapping) -> Tensor | Gated | None:
        """fp32[S, T, U] for the group's S targets, the T rows of x [T, in] and the U `mapping.pages`; None for 1; or
        the gates that say it.

        On a GPU it runs while a graph is captured: it may only launch work whose shapes follow from those of x and of
        the mapping, and reads all that changes between steps from device memory.
        """
        ...


@dataclass(frozen=True)
class LoraContext:
    """What the linears of one layer need of a step: its mappings and this layer's pages (A, B), by group name."""

    layer: int
    mappings: ReadOnlyDict[str, Mapping]
    pages: ReadOnlyDict[str, tuple[Tensor, Tensor]]
    router: LayerRouter | None = None


class LoraLinear:
    """The linears of one target group as one product, plus each row's LoRA updates."""

    def __init__(
        self, group: TargetGroup, outputs: tuple[int, ...], weight: Tensor, bias: Tensor | None, ops: Ops
    ) -> None:
        """weight [sum(outputs), in], bias [sum(outputs)] or None; `outputs` are the sizes of the group's targets."""
        self.group = group.name
        self.outputs = outputs
        self.weight = ops.pack_linear(weight)
        self.bias = bias
        self.ops = ops

    def __call__(self, x: Tensor, context: LoraContext) -> Summands:
        """x [T, in] -> [T, sum(outputs)], as a sum that the consumer carries out."""
        mapping = context.mappings.get(self.group)
        if mapping is None:
            return self.ops.linear(x, self.weight, self.bias), None
        router = context.router
        scale = None if router is None else router.scale(context.layer, self.group, x, mapping)
        pages = context.pages[self.group]
        return self.ops.lora_linear(x, self.weight, self.bias, pages, mapping, self.outputs, scale)
