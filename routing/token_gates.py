"""The gates of one token-level router in memory."""

from collections.abc import Mapping

import torch
from torch import Tensor

from adapters_store.types import GROUPS, TARGETS


class TokenGates:
    """One router's gates. Linears that share an input are one product.

    `groups`: by target group name [layers, S, n, d_in], in the model's dtype, for the S targets of the group. All
    layers have gates on the same targets; where a group has targets without, its `present` [S, 1, 1] is 0 for them and
    1 for the others: no adapter acts there.
    """

    def __init__(self, gates: Mapping[tuple[int, str], Tensor], device: torch.device, dtype: torch.dtype) -> None:
        """gates: [n, d_in] by (layer, target), as `load_gates` reads them."""
        self.num_rows = len(next(iter(gates.values())))
        self.targets = sum(1 << number for number, target in enumerate(TARGETS) if (0, target) in gates)
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

    def pinned(self) -> "TokenGates":
        """The same in page-locked memory, from which a GPU copies while the host goes on."""
        self.groups = {group: gates.pin_memory() for group, gates in self.groups.items()}
        return self
