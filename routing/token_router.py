"""MeteoRA's token-level routing: gates that weigh the embedded adapters anew for every token, in every linear.

For a linear with input x and gates G (n, d_in): g = G x; the k highest logits are chosen; the weights are their softmax
over the temperature; y = W x + sum_i w_i s_i B_i A_i x (MeteoRA, section 3.2).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from adapters_store.types import GROUPS, LinearShape
from kernels.ops import Mapping as PageMapping
from routing.card_file import RouterFolderError
from routing.gate_folder import load_gates
from server.engine.gates import GatePart

SLICES = {group.name: len(group.targets) for group in GROUPS}


class TokenGates:
    """One router's gates. Linears that share an input are one product.

    `groups`: by target group name [layers, S, n, d_in], in the model's dtype, for the S targets of the group. All
    layers have gates on the same targets; where a group has targets without, its `present` [S, 1, 1] is 0 for them and
    1 for the others: no adapter acts there.
    """

    def __init__(self, gates: Mapping[tuple[int, str], Tensor], device: torch.device, dtype: torch.dtype) -> None:
        """gates: [n, d_in] by (layer, target), as `load_gates` reads them."""
        self.num_rows = len(next(iter(gates.values())))
        self.groups: dict[str, Tensor] = {}
        self.present: dict[str, Tensor] = {}
        layers = 1 + max(layer for layer, _ in gates)
        for group in GROUPS:
            present = [target for target in group.targets if (0, target) in gates]
            if not present:
                continue
            none = torch.zeros_like(gates[0, present[0]])
            stacked = [[gates.get((layer, target), none) for target in group.targets] for layer in range(layers)]
            self.groups[group.name] = torch.stack([torch.stack(own) for own in stacked]).to(device, dtype)
            if len(present) < len(group.targets):
                has = [float(target in present) for target in group.targets]
                self.present[group.name] = torch.tensor(has, device=device).view(-1, 1, 1)


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

    def shares(self) -> list[Tensor]:
        """For each part fp32[R, n]: the mean weight of the gates' rows over the gates in groups that a row touches."""
        return [total / total.sum(dim=1, keepdim=True).clamp(min=1.0) for total in self._totals]

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
        """Raises ValueError for gates that do not fit the model, OSError."""
        try:
            gates = load_gates(Path(path), self._shape)
        except RouterFolderError as error:
            raise ValueError(str(error)) from error
        return TokenGates(gates, self._device, self._dtype)

    def router(self, parts: Sequence[GatePart]) -> TokenRouter:
        return TokenRouter(parts, self._device)


def _gates(part: GatePart) -> TokenGates:
    assert isinstance(part.gates, TokenGates)
    return part.gates
