"""The gates of MeteoRA's routers at fixed addresses on a GPU, where captured steps read them."""

from itertools import accumulate

import torch
from torch import Tensor

from adapters_store.types import GROUPS, LinearShape
from kernels.gate_rows import Gated
from kernels.ops import Mapping as PageMapping
from routing.token_gates import TokenGates
from server.engine.gate_stage import GateViews
from server.engine.gates import Gates, GateShape

FIRST_TARGETS = dict(
    zip((group.name for group in GROUPS), accumulate((len(group.targets) for group in GROUPS), initial=0), strict=False)
)
GROUP_NUMBERS = {group.name: number for number, group in enumerate(GROUPS)}


class TokenSlots:
    """Room for some routers. `groups`: by group name [slots, layers, S, gates, d_in] for the group's S targets.

    What is beyond the gates of a slot's router, and the targets that it has none for, keep what was there before.
    """

    def __init__(self, model: LinearShape, shape: GateShape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = shape
        self.groups = {
            group.name: torch.zeros(
                (shape.slots, model.num_layers, len(group.targets), shape.gates, model.group_input(group)),
                device=device,
                dtype=dtype,
            )
            for group in GROUPS
        }

    @property
    def num_bytes(self) -> int:
        return sum(gates.nbytes for gates in self.groups.values())

    def load(self, slot: int, gates: Gates) -> None:
        """Copy a router's gates behind all work that has been launched: a step under way may still read the slot."""
        assert isinstance(gates, TokenGates)
        for group, own in gates.groups.items():
            self.groups[group][slot, :, :, : gates.num_rows].copy_(own, non_blocking=True)

    def router(self, views: GateViews) -> "SlotRouter":
        """A router for the rows that the views describe, whenever the step that was launched with it runs."""
        return SlotRouter(self.groups, views)


class SlotRouter:
    """Routes the rows of one step by what the device knows of them."""

    def __init__(self, groups: dict[str, Tensor], views: GateViews) -> None:
        self._groups = groups
        self._views = views

    def scale(self, layer: int, group: str, x: Tensor, mapping: PageMapping) -> Gated:  # noqa: ARG002
        """The gates of the layer's linears: the kernels that read their inputs weigh the adapters too."""
        gates = self._groups[group][:, layer]
        columns = self._views.columns[group]
        return Gated(gates, self._views.rows, columns, GROUP_NUMBERS[group], FIRST_TARGETS[group])
