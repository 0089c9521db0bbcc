"""The layout of rank pages: how large they are, how many a mix needs, and one adapter's weights in that form.

Per target group with S slices (its targets) of `in` input and `out` output features, page p of layer l is
a[l, p]: (S * 16, in), rows 16 s .. 16 s + 15 belonging to slice s, and b[l, p]: (16, sum(out)), the B's transposed.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adapters_store.types import (
    GROUP_OF,
    GROUPS,
    PAGE_RANK,
    AdapterError,
    AdapterWeights,
    Composition,
    LinearShape,
    Mix,
    TargetGroup,
)


def page_bytes(shape: LinearShape, group: TargetGroup, dtype_size: int) -> int:
    """Bytes of one rank page of `group`, over all layers; `dtype_size` is in bytes an element."""
    elements = PAGE_RANK * (len(group.targets) * shape.group_input(group) + sum(shape.group_outputs(group)))
    return shape.num_layers * elements * dtype_size


def plan_pages(shape: LinearShape, budget_bytes: int, dtype_size: int) -> dict[str, int]:
    """The largest equal number of pages for every group whose memory stays within `budget_bytes`, by group name.

    The planned memory is exactly the sum of `page_bytes` times pages. Raises ValueError if not one page a group fits.
    """
    one_of_each = sum(page_bytes(shape, group, dtype_size) for group in GROUPS)
    count = budget_bytes // one_of_each
    if count < 1:
        raise ValueError(
            f"page memory of {budget_bytes} bytes is too small: one page in every group takes {one_of_each} bytes"
        )
    return {group.name: count for group in GROUPS}


def rank_pages(ranks: Mapping[str, int]) -> dict[str, int]:
    """Pages that an adapter of the given rank per group owns, by group name; absent groups need none."""
    return {name: -(-rank // PAGE_RANK) for name, rank in ranks.items() if rank > 0}


def pages_needed(mix: Mix, ranks: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Pages of `mix` per group name, given each adapter's `AdapterWeights.group_ranks` by digest.

    A mixture needs the pages of each of its adapters, a fusion those of the largest rank in each group.
    """
    sizes = [rank_pages(ranks[digest]) for digest in dict.fromkeys(mix.digests)]
    combine = max if mix.composition is Composition.FUSION else sum
    return {group.name: combine([size.get(group.name, 0) for size in sizes] or [0]) for group in GROUPS}


@dataclass(frozen=True)
class PackedGroup:
    """One adapter in one target group: a (layers, pages, S * 16, in), b (layers, pages, 16, sum(out)), one scale.

    `ranks`: how many rank rows of each page are in use; the others are zero.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    ranks: tuple[int, ...]


def pack(weights: AdapterWeights, shape: LinearShape, dtype: torch.dtype) -> dict[str, PackedGroup]:
    """`weights` as rank pages in host memory, by group name; untouched slices and rank rows are zero.

    Where the pairs of a group differ in scale, the most frequent one is the group's and the ratio goes into B.
    Raises AdapterError `adapter_not_finite` where B overflows.
    """
    pages = rank_pages(weights.group_ranks)
    return {
        group.name: _pack_group(weights, shape, group, pages[group.name], dtype)
        for group in GROUPS
        if group.name in pages
    }


def _pack_group(
    weights: AdapterWeights, shape: LinearShape, group: TargetGroup, pages: int, dtype: torch.dtype
) -> PackedGroup:
    outputs = shape.group_outputs(group)
    pairs = {key: pair for key, pair in weights.pairs.items() if GROUP_OF[key[1]] is group}
    scale = _common_scale([pair.scale for pair in pairs.values()])
    a = torch.zeros(shape.num_layers, pages, len(outputs), PAGE_RANK, shape.group_input(group), dtype=dtype)
    b = torch.zeros(shape.num_layers, pages, PAGE_RANK, sum(outputs), dtype=dtype)
    for (layer, target), pair in pairs.items():
        place = group.targets.index(target)
        columns = b[layer].narrow(-1, sum(outputs[:place]), outputs[place])
        ratio = 1.0 if pair.scale == scale else pair.scale / scale
        transposed = pair.b.T if ratio == 1.0 else pair.b.T.float() * ratio
        for page, start in enumerate(range(0, pair.rank, PAGE_RANK)):
            stop = min(start + PAGE_RANK, pair.rank)
            a[layer, page, place, : stop - start] = pair.a[start:stop]
            columns[page, : stop - start] = transposed[start:stop]
    if not b.isfinite().all():
        # finite in the file, but not in this dtype, or not once a scale or a fusion was multiplied in: rows of others
        # may meet B with weight 0, and 0 times infinity is NaN
        raise AdapterError("adapter_not_finite", f"adapter {weights.digest[:12]} has values too large for {dtype}")
    rank = max(pair.rank for pair in pairs.values())
    ranks = tuple(min(PAGE_RANK, rank - start) for start in range(0, rank, PAGE_RANK))
    return PackedGroup(a.flatten(2, 3), b, scale, ranks)


def _common_scale(scales: list[float]) -> float:
    """The most frequent scale other than 0, which could not stand for the others; 0 if there is none."""
    nonzero = Counter(scale for scale in scales if scale)
    return nonzero.most_common(1)[0][0] if nonzero else 0.0
