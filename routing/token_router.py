"""MeteoRA's token-level routing: gates that weigh the embedded adapters anew for every token, in every linear.

For a linear with input x and gates G (n, d_in): g = G x; the k highest logits are chosen; the weights are their softmax
over the temperature; y = W x + sum_i w_i s_i B_i A_i x (MeteoRA, section 3.2).
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapters_store.types import GROUPS, TARGETS, LinearShape
from kernels.ops import Mapping as PageMapping
from routing.card_file import RouterFolderError
from routing.gate_folder import load_gates
from routing.token_gates import TokenGates
from server.engine.gates import GatePart, GateShape

if TYPE_CHECKING:
    from routing.token_slots import TokenSlots

SLICES = {group.name: len(group.targets) for group in GROUPS}


class TokenRouter:
    """Routes the rows of one step; rows that use no gates keep the weights that their mapping has."""

    def __init__(self, parts: Sequence[GatePart], device: torch.device) -> None:
        self._parts = [(part, _gates(part)) for part in parts]
        self._totals = [torch.zeros(part.count, part.gates.num_rows, device=device) for part in parts]

    def scale(self, layer: int, group: str, x: Tensor, mapping: PageMapping) -> Tensor:  # noqa: ARG002
        """fp32[S, T, U] for rows x [T, in]: the weight of the adapter that each column of the mapping belongs to."""
        if self._parts[0][0].rows is None:
            return self._weights(0, layer, group, x)
        columns = self._parts[0][0].owners[group].shape[1]
        scale = torch.ones(SLICES[group], len(x), columns, dtype=torch.float32, device=x.device)
        for place, (part, _) in enumerate(self._parts):
            assert part.rows is not None
            scale[:, part.rows] = self._weights(place, layer, group, x.index_select(0, part.rows))
        return scale

    def totals(self) -> list[Tensor]:
        """For each part fp32[R, n]: the weights of its gates' rows, summed over gates in groups that a row touches."""
        return self._totals

    def _weights(self, place: int, layer: int, group: str, x: Tensor) -> Tensor:
        """fp32[S, R, U] for the rows x [R, in] of a part."""
        part, gates = self._parts[place]
        owners, touched = part.owners[group], part.touched[group]
        if group not in gates.groups:
            return torch.zeros(SLICES[group], len(x), owners.shape[1], dtype=torch.float32, device=x.device)
        weights = gate_weights(x, gates.groups[group][layer], part)
        present = gates.present.get(group)
        if present is not None:
            weights = weights * present
        total = weights.sum(dim=0)
        self._totals[place] += total if touched is None else total * touched[:, None]
        return weights @ owners


def gate_weights(x: Tensor, gates: Tensor, part: GatePart) -> Tensor:
    """fp32[S, R, n] for the R rows of x [R, in] and gates [S, n, in]: 0 for all but each row's `top_k` allowed ones."""
    logits = (x @ gates.flatten(0, 1).T).float().view(len(x), *gates.shape[:2]).transpose(0, 1)
    if part.allowed is not None:
        logits = logits.masked_fill(~part.allowed, -torch.inf)
    most = min(part.most, logits.shape[2])
    chosen, index = logits.topk(most, dim=2)
    if part.top_k is not None:
        beyond = torch.arange(most, device=x.device) >= part.top_k[:, None]
        chosen = chosen.masked_fill(beyond, -torch.inf)
    if part.temperature is not None:
        limits = torch.finfo(torch.float32)
        chosen = (chosen - chosen[..., :1]) / part.temperature[:, None].clamp(limits.tiny, limits.max)
    return torch.zeros_like(logits).scatter_(2, index, chosen.softmax(dim=2))


class TokenGateFactory:
    """Reads token-level routers for one model; see `server.engine.gates.GateFactory`."""

    def __init__(self, shape: LinearShape, device: torch.device, dtype: torch.dtype) -> None:
        self._shape = shape
        self._device = device
        self._dtype = dtype

    def read(self, path: str) -> TokenGates:
        return self._read(path, self._device)

    def read_for_slots(self, path: str) -> TokenGates:
        return self._for_slots(self._read(path, torch.device("cpu")))

    def random(self, num_rows: int, path: str) -> TokenGates:
        """Logits of inputs of size 1 are of size 1."""
        generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
        sizes = {
            (layer, target): self._shape.inputs[target] for layer in range(self._shape.num_layers) for target in TARGETS
        }
        gates = {
            key: torch.randn(num_rows, inputs, generator=generator) * inputs**-0.5 for key, inputs in sizes.items()
        }
        return self._for_slots(TokenGates(gates, torch.device("cpu"), self._dtype))

    def router(self, parts: Sequence[GatePart]) -> TokenRouter:
        return TokenRouter(parts, self._device)

    def slots(self, shape: GateShape) -> "TokenSlots":
        from routing.token_slots import TokenSlots  # only a GPU's backend has Triton's kernels

        return TokenSlots(self._shape, shape, self._device, self._dtype)

    def _for_slots(self, gates: TokenGates) -> TokenGates:
        return gates.pinned() if self._device.type == "cuda" else gates

    def _read(self, path: str, device: torch.device) -> TokenGates:
        try:
            gates = load_gates(Path(path), self._shape)
        except RouterFolderError as error:
            raise ValueError(str(error)) from error
        return TokenGates(gates, device, self._dtype)


def _gates(part: GatePart) -> TokenGates:
    assert isinstance(part.gates, TokenGates)
    return part.gates
