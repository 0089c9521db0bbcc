"""One new adapter made of several: concatenation, sums of factors, truncated SVD, TIES, DARE, magnitude pruning."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, reduce
from typing import Any

import torch

from adapters_store.types import TARGETS, AdapterError, AdapterWeights, LoraPair

Terms = Sequence[tuple[LoraPair, float]]
"""The pairs of one linear and their weights, in the recipe's order; adapters without that linear are absent."""


class MergeMethod(StrEnum):
    """How adapters become one. With c_i = weight_i * scale_i, the exact weighted sum is D = sum_i c_i B_i A_i.

    `cat` equals D at the sum of the ranks, `svd` is the best approximation of D of a chosen rank. The others work on
    the factors, A with sign(c_i) sqrt|c_i| and B with sqrt|c_i| as weights, and so hold products of A_i and B_j too;
    they need equal ranks. `linear` sums; `magnitude_prune` sums the largest entries; `ties` averages, per entry, those
    of the largest entries that have the elected sign (arXiv 2306.01708); `dare_linear` and `dare_ties` keep random
    entries, made larger by 1 / density (arXiv 2311.03099). All follow `add_weighted_adapter` of PEFT.
    """

    CAT = "cat"
    LINEAR = "linear"
    SVD = "svd"
    TIES = "ties"
    DARE_LINEAR = "dare_linear"
    DARE_TIES = "dare_ties"
    MAGNITUDE_PRUNE = "magnitude_prune"

    @property
    def prunes(self) -> bool:
        """Whether it takes a density."""
        return self not in (MergeMethod.CAT, MergeMethod.LINEAR, MergeMethod.SVD)

    @property
    def draws(self) -> bool:
        """Whether it takes a seed."""
        return self in (MergeMethod.DARE_LINEAR, MergeMethod.DARE_TIES)


@dataclass(frozen=True)
class MergeRecipe:
    """All that decides a merge: `entries` are (digest, weight) in order, the rest is None where the method has no use.

    Made by `MergeRecipe.of`. The same recipe gives the same adapter, up to the rounding of another linear algebra.
    """

    method: MergeMethod
    entries: tuple[tuple[str, float], ...]
    rank: int | None = None
    density: float | None = None
    seed: int | None = None

    @classmethod
    def of(
        cls,
        entries: Sequence[tuple[str, float]],
        method: str,
        rank: int | None = None,
        density: float | None = None,
        seed: int = 0,
    ) -> "MergeRecipe":
        """Check the arguments of `merge`, before any adapter is read; names will do for the digests.

        Raises AdapterError `invalid_merge` (400) with the field in `param`.
        """
        if method not in [*MergeMethod]:
            raise _invalid(f"method is {method!r}: expected one of {', '.join(MergeMethod)}", "method")
        chosen = MergeMethod(method)
        if not entries:
            raise _invalid("adapters is empty: expected at least one", "adapters")
        for index, (adapter, weight) in enumerate(entries):
            if not math.isfinite(weight) or not weight:
                raise _invalid(
                    f"the weight of adapter {adapter!r} is {weight}: expected a finite number other than 0",
                    f"adapters.{index}.weight",
                )
        if rank is not None and (chosen is not MergeMethod.SVD or rank < 1):
            message = f"rank is {rank} for {chosen}: expected a positive integer for svd, nothing for the others"
            raise _invalid(message, "rank")
        if chosen.prunes and not (density is not None and 0 < density <= 1):
            raise _invalid(f"density is {density}: expected a number above 0 and up to 1 for {chosen}", "density")
        if not chosen.prunes and density is not None:
            raise _invalid(f"density is {density}: expected none for {chosen}, which prunes nothing", "density")
        if not 0 <= seed < 1 << 63:
            raise _invalid(f"seed is {seed}: expected an integer from 0 to 2^63 - 1", "seed")
        pairs = tuple((digest, float(weight)) for digest, weight in entries)
        return cls(chosen, pairs, rank, None if density is None else float(density), seed if chosen.draws else None)

    def as_json(self) -> dict[str, Any]:
        """For the record: `{"method", "adapters": [{"digest", "weight"}], "rank", "density", "seed"}`."""
        adapters = [{"digest": digest, "weight": weight} for digest, weight in self.entries]
        rest = {"rank": self.rank, "density": self.density, "seed": self.seed}
        return {"method": self.method.value, "adapters": adapters} | rest

    @cached_property
    def digest(self) -> str:
        """sha256 over the recipe."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()


def merge(
    adapters: Sequence[tuple[AdapterWeights, float]],
    method: str,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> AdapterWeights:
    """The merge of weighted adapters; its digest is that of the recipe, and the weights are taken as given.

    `rank`, of `svd` only, is by default the largest of all; a linear gets less where less already holds everything.
    `density` is the share of entries of each factor that pruning keeps. `seed` decides the random choices: the draws
    run over layers, targets in the order of `TARGETS`, A before B, adapters as given. A linear that an adapter lacks
    counts as zero. Sums are in fp32, the SVD in fp64; the result has the adapters' common dtype, but is in fp32 where
    `cat` would otherwise have to round.

    Raises AdapterError: `invalid_merge` (400) for arguments or ranks that do not fit the method,
    `adapter_shape_mismatch`, `adapter_touches_no_module`, `adapter_not_finite` (422) where the sums overflow.
    """
    entries = [(weights.digest, weight) for weights, weight in adapters]
    recipe = MergeRecipe.of(entries, method, rank, density, seed)
    modules = _gather(adapters)
    dtype = reduce(torch.promote_types, {pair.a.dtype for terms in modules.values() for pair, _ in terms})
    match recipe.method:
        case MergeMethod.CAT:
            pairs = {module: _cat(terms) for module, terms in modules.items()}
            dtype = torch.float32 if any(_rounds(pair, dtype) for pair in pairs.values()) else dtype
        case MergeMethod.SVD:
            largest = rank or max(pair.rank for terms in modules.values() for pair, _ in terms)
            pairs = {module: _finish(module, _svd(terms, largest), dtype) for module, terms in modules.items()}
        case _:
            merge_factors = _factor_method(recipe)
            pairs = {
                module: _finish(module, _by_factors(module, terms, merge_factors), dtype)
                for module, terms in modules.items()
            }
    return AdapterWeights(recipe.digest, {module: _finish(module, pair, dtype) for module, pair in pairs.items()})


def _gather(adapters: Sequence[tuple[AdapterWeights, float]]) -> Mapping[tuple[int, str], Terms]:
    """The terms of every linear that any adapter touches, in the model's order."""
    touched = {module for weights, _ in adapters for module in weights.pairs}
    modules: dict[tuple[int, str], Terms] = {}
    for module in sorted(touched, key=lambda module: (module[0], TARGETS.index(module[1]))):
        terms = [(weights.pairs[module], weight) for weights, weight in adapters if module in weights.pairs]
        sizes = {(pair.b.shape[0], pair.a.shape[1]) for pair, _ in terms}
        if len(sizes) > 1:
            raise AdapterError(
                "adapter_shape_mismatch",
                f"the adapters' {_name(module)} have {' and '.join(f'{o} x {i}' for o, i in sorted(sizes))} features: "
                "expected adapters of one base model",
            )
        modules[module] = terms
    if not modules:
        raise AdapterError("adapter_touches_no_module", "no adapter touches a linear: expected at least one LoRA pair")
    return modules


def _cat(terms: Terms) -> LoraPair:
    """Factors side by side, in fp32. The most frequent weight * scale stays outside, and its factors as they are."""
    scales = [weight * pair.scale for pair, weight in terms]
    nonzero = Counter(scale for scale in scales if scale)
    # Among equally frequent ones the largest: the others' factors then shrink and cannot overflow.
    common = max(nonzero, key=lambda scale: (nonzero[scale], abs(scale)), default=0.0)
    ratios = [scale / common if common else 1.0 for scale in scales]
    a = torch.cat([pair.a.float() * ratio for (pair, _), ratio in zip(terms, ratios, strict=True)])
    return LoraPair(a, torch.cat([pair.b.float() for pair, _ in terms], dim=1), common)


def _rounds(pair: LoraPair, dtype: torch.dtype) -> bool:
    return any(not torch.equal(factor.to(dtype).float(), factor) for factor in (pair.a, pair.b))


def _svd(terms: Terms, rank: int) -> LoraPair:
    """The truncated SVD U S V^T of sum_i c_i B_i A_i as B = U S and A = V^T, through QR of the stacked factors.

    With Q_b R_b = [B_1 ... B_n] and Q_a R_a = [A_1; ...; A_n]^T, the singular values of the sum are those of the small
    R_b diag(c) R_a^T, and the vectors its vectors turned by Q_b and Q_a: time and memory are linear in the features.
    """
    stacked_b = torch.cat([pair.b.double() for pair, _ in terms], dim=1)
    stacked_a = torch.cat([pair.a.double() * (weight * pair.scale) for pair, weight in terms])
    q_b, r_b = torch.linalg.qr(stacked_b)
    q_a, r_a = torch.linalg.qr(stacked_a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return LoraPair(vh[:rank] @ q_a.T, q_b @ (u[:, :rank] * s[:rank]), 1.0)


FactorMerge = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From stacked factors (n, ...) and their weights (n,), both fp32, to one factor."""


def _by_factors(module: tuple[int, str], terms: Terms, merge_factors: FactorMerge) -> LoraPair:
    ranks = [pair.rank for pair, _ in terms]
    if len(set(ranks)) > 1:
        raise _invalid(
            f"the adapters' {_name(module)} have ranks {', '.join(map(str, ranks))}: "
            "expected equal ranks, or the method cat or svd"
        )
    scales = torch.tensor([weight * pair.scale for pair, weight in terms], dtype=torch.float64)
    roots = scales.abs().sqrt()
    # The sign goes to one factor only: on both it would cancel.
    a = merge_factors(torch.stack([pair.a.float() for pair, _ in terms]), (roots * scales.sign()).float())
    b = merge_factors(torch.stack([pair.b.float() for pair, _ in terms]), roots.float())
    return LoraPair(a, b, 1.0)


def _factor_method(recipe: MergeRecipe) -> FactorMerge:
    """Pruning of each factor, then their sum or the mean of those that agree in sign."""
    density = 1.0 if recipe.density is None else recipe.density
    generator = torch.Generator().manual_seed(recipe.seed or 0)

    def prune(factor: torch.Tensor) -> torch.Tensor:
        if density == 1:
            return factor
        return _drop_at_random(factor, density, generator) if recipe.method.draws else _keep_largest(factor, density)

    combine = _agreeing_mean if recipe.method in (MergeMethod.TIES, MergeMethod.DARE_TIES) else _weighted_sum
    return lambda factors, weights: combine(torch.stack([prune(factor) for factor in factors]), weights)


def _keep_largest(factor: torch.Tensor, density: float) -> torch.Tensor:
    kept = factor.abs().flatten().topk(int(density * factor.numel())).indices
    pruned = torch.zeros_like(factor)
    pruned.view(-1)[kept] = factor.flatten()[kept]
    return pruned


def _drop_at_random(factor: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    kept = torch.bernoulli(torch.full_like(factor, density), generator=generator)
    return factor * kept / density


def _weighted_sum(factors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.einsum("n,n...->...", weights, factors)


def _agreeing_mean(factors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """TIES: the sign of the unweighted sum wins an entry, + where that is 0; the mean is of weighted entries."""
    elected = torch.where(factors.sum(0) >= 0, 1.0, -1.0)
    agreeing = factors.sign() == elected
    return _weighted_sum(factors * agreeing, weights) / agreeing.sum(0).clamp(min=1)


def _finish(module: tuple[int, str], pair: LoraPair, dtype: torch.dtype) -> LoraPair:
    a, b = pair.a.to(dtype).contiguous(), pair.b.to(dtype).contiguous()
    alpha = abs(pair.scale) * pair.rank
    if not (a.isfinite().all() and b.isfinite().all() and alpha <= torch.finfo(torch.float32).max):
        raise AdapterError(
            "adapter_not_finite",
            f"the merged {_name(module)} overflows {str(dtype).removeprefix('torch.')}: expected smaller weights",
        )
    return LoraPair(a, b, pair.scale)


def _name(module: tuple[int, str]) -> str:
    return f"{module[1]} of layer {module[0]}"


def _invalid(message: str, param: str | None = None) -> AdapterError:
    return AdapterError("invalid_merge", message, 400, param)
