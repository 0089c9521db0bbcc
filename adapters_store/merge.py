"""Adapters made of adapters."""

from collections.abc import Sequence

import torch

from adapters_store.types import AdapterWeights, Composition, LoraPair, Mix


def fuse(adapters: Sequence[tuple[AdapterWeights, float]], dtype: torch.dtype | None = None) -> AdapterWeights:
    """The fusion of weighted adapters: A = sum_j w_j A_j and B = sum_j w_j s_j B_j on every linear, with scale 1.

    Ranks are zero-padded to the largest; a linear that an adapter lacks counts as zero. Sums are in fp32, the result in
    `dtype` or else that of the first adapter. The weights are taken as given, and the digest is that of the fusion mix
    of these weights. Raises ValueError without adapters.

    Source: LoraRetriever (arXiv 2402.09997), the fusion composition; unlike a mixture, its product has cross terms.
    """
    if not adapters:
        raise ValueError("a fusion needs at least one adapter")
    dtype = dtype or next((pair.a.dtype for pair in adapters[0][0].pairs.values()), torch.float32)
    modules = sorted({module for weights, _ in adapters for module in weights.pairs})
    pairs: dict[tuple[int, str], LoraPair] = {}
    for module in modules:
        terms = [(weights.pairs[module], weight) for weights, weight in adapters if module in weights.pairs]
        pairs[module] = _fuse_pairs(terms, dtype)
    mix = Mix(tuple(sorted((weights.digest, weight) for weights, weight in adapters)), Composition.FUSION)
    return AdapterWeights(mix.digest, pairs)


def _fuse_pairs(terms: Sequence[tuple[LoraPair, float]], dtype: torch.dtype) -> LoraPair:
    rank = max(pair.rank for pair, _ in terms)
    first = terms[0][0]
    a = torch.zeros(rank, first.a.shape[1], dtype=torch.float32)
    b = torch.zeros(first.b.shape[0], rank, dtype=torch.float32)
    for pair, weight in terms:
        a[: pair.rank] += weight * pair.a.float()
        b[:, : pair.rank] += weight * pair.scale * pair.b.float()
    return LoraPair(a.to(dtype), b.to(dtype), 1.0)
