"""An encoder of chosen vectors, and the names that a registry would know."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from adapters_store.registry import Resolved
from routing.encoder import EncoderUnavailable


def unit(*values: float) -> NDArray[np.float32]:
    vector = np.asarray(values, np.float32)
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


class ChosenEncoder:
    """Texts are numbers with commas between, and their vectors those numbers, normalised. Remembers what was asked."""

    id = "chosen"

    def __init__(self, width: int) -> None:
        self.width = width
        self.failure: str | None = None
        self.asked: list[list[str]] = []
        self.tenants: list[str] = []

    async def embed(
        self,
        texts: Sequence[str],
        *,
        tenant: str = "",
        bulk: bool = False,  # noqa: ARG002
    ) -> NDArray[np.float32]:
        self.asked.append(list(texts))
        self.tenants.append(tenant)
        if self.failure is not None:
            raise EncoderUnavailable(self.failure)
        return np.stack([unit(*map(float, text.split(","))) for text in texts])


class Names:
    """What names mean: (owner, name) -> public."""

    def __init__(self, **public: Mapping[str, bool]) -> None:
        self.owned = {owner: dict(names) for owner, names in public.items()}

    async def resolve(self, tenant: str, names: Sequence[str]) -> Mapping[str, Resolved]:
        found: dict[str, Resolved] = {}
        for wanted in names:
            name, _, prefix = wanted.partition("@")
            owners = [owner for owner, theirs in self.owned.items() if theirs.get(name)]
            owners = [tenant] if name in self.owned.get(tenant, {}) else owners
            for owner in owners:
                digest = f"{prefix or owner}-{name}"
                found[wanted] = Resolved(owner, name, digest, self.owned[owner][name], "", "")
        return found
