"""What a prompt-level router decided for a prompt, as it rides with the sequence."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters_store.types import Mix
from server.engine.prompt_routers import Decided, PromptUse, Verdict


@dataclass(frozen=True, eq=False)
class Decision:
    """`mix` is what the prompt is computed with from now on.

    weights: fp32[L, 7, n] on the host, by layer and target in the order of `TARGETS` a further factor for each of the
    mix's adapters; None where all factors are 1. key: sha256 of them, empty for None.
    """

    mix: Mix
    weights: Tensor | None
    key: bytes
    told: Decided

    @classmethod
    def of(cls, use: PromptUse, mix: Mix, verdict: Verdict, seconds: float) -> "Decision | None":
        """The decision of a verdict on the host; None if that is not finite. `mix`: all that the request may use.

        Adapters that act nowhere leave the mix, and one that acts alike everywhere has its weight in there, unless the
        prompt is computed already with all of them, layer by layer.
        """
        weights, chosen, probabilities = verdict
        if not bool(torch.isfinite(probabilities).all()):
            return None
        factors = _factors(use, mix, weights)
        acting = {digest: factor for digest, factor in factors.items() if use.layered or bool(factor.any())}
        weight_of = {digest: _constant(factor) for digest, factor in acting.items()}
        table, key = None, b""
        if all(weight is not None and (weight == 1 or not use.layered) for weight in weight_of.values()):
            entries = tuple((digest, weight_of[digest] or 0.0) for digest, _ in mix.entries if digest in acting)
        else:
            entries = tuple((digest, 1.0) for digest in acting)
            table = torch.stack(list(acting.values()), dim=2)
            key = hashlib.sha256(table.numpy().tobytes()).digest()
        told = Decided(
            tuple(tuple(layer.nonzero().flatten().tolist()) for layer in chosen),
            tuple(tuple(layer.tolist()) for layer in probabilities),
            seconds,
        )
        return cls(Mix(entries), table, key, told)

    @property
    def num_bytes(self) -> int:
        """Of host memory, roughly."""
        numbers = sum(map(len, self.told.probabilities)) + sum(map(len, self.told.chosen))
        return 1024 + 32 * numbers + (0 if self.weights is None else self.weights.nbytes)


def _factors(use: PromptUse, mix: Mix, weights: Tensor) -> dict[str, Tensor]:
    """By adapter of the mix fp32[L, 7]; two rows may stand for the same one."""
    factors = {digest: torch.zeros(weights.shape[:2]) for digest in mix.digests}
    for place, digest in enumerate(use.rows):
        if digest is not None:
            factors[digest] += weights[:, :, place]
    return factors


def _constant(factor: Tensor) -> float | None:
    """The one value of a tensor, None if it has several."""
    first = float(factor.flatten()[0])
    return first if bool((factor == first).all()) else None
