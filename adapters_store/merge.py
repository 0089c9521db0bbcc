"""Adapters made of adapters."""

from collections.abc import Sequence

import torch

from adapters_store.pages import PackedAdapter, PackedGroup, check_finite, empty_pages
from adapters_store.types import GROUPS, Composition, LinearShape, Mix, TargetGroup


def fuse(
    adapters: Sequence[tuple[PackedAdapter, float]], shape: LinearShape, dtype: torch.dtype, *, pinned: bool = False
) -> PackedAdapter:
    """The fusion of weighted adapters: A = sum_j w_j A_j and B = sum_j w_j s_j B_j on every linear, with scale 1.

    Ranks are zero-padded to the largest; a linear that an adapter lacks counts as zero. Sums are in fp32, or fp64 for
    adapters of that; the result is in `dtype`, page-locked if `pinned`. The weights are taken as given, and the digest
    is that of the fusion mix of these weights. Raises ValueError without adapters, and AdapterError
    `adapter_not_finite` where a sum is too large for `dtype`.

    Source: LoraRetriever (arXiv 2402.09997), the fusion composition; unlike a mixture, its product has cross terms.
    """
    if not adapters:
        raise ValueError("a fusion needs at least one adapter")
    mix = Mix(tuple(sorted((adapter.digest, weight) for adapter, weight in adapters)), Composition.FUSION)
    groups: dict[str, PackedGroup] = {}
    for group in GROUPS:
        terms = [(adapter.groups[group.name], weight) for adapter, weight in adapters if group.name in adapter.groups]
        if terms:
            groups[group.name] = _fuse_group(terms, shape, group, dtype, pinned)
            check_finite(groups[group.name].pages, f"the fusion of {len(adapters)} adapters")
    return PackedAdapter(mix.digest, groups)


def _fuse_group(
    terms: Sequence[tuple[PackedGroup, float]],
    shape: LinearShape,
    group: TargetGroup,
    dtype: torch.dtype,
    pinned: bool,
) -> PackedGroup:
    rank = max(sum(packed.ranks) for packed, _ in terms)
    pages = empty_pages(shape, group, rank, dtype, pinned=pinned)
    wide = torch.promote_types(dtype, torch.float32)
    for number, (a, b) in enumerate(pages):
        sum_a, sum_b = torch.zeros(a.shape, dtype=wide), torch.zeros(b.shape, dtype=wide)
        for packed, weight in terms:
            if number < len(packed.pages):
                own_a, own_b = packed.pages[number]
                rows = own_b.shape[1]
                sum_a[:, :, :rows].add_(own_a, alpha=weight)
                sum_b[:, :rows].add_(own_b, alpha=weight * packed.scale)
        a.copy_(sum_a)
        b.copy_(sum_b)
    return PackedGroup(pages, 1.0)
