"""The layout of rank pages: how large they are, how many a mix needs, and one adapter's weights in that form.

Per target group with S slices (its targets) of `in` input and `out` output features, page p of layer l is
a[l, p]: (S * 16, in), rows 16 s .. 16 s + 15 belonging to slice s, and b[l, p]: (16, sum(out)), the B's transposed.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from adapters_store.types import (
    GROUP_OF,
    GROUPS,
    PAGE_RANK,
    AdapterError,
    AdapterWeights,
    Composition,
    LinearShape,
    LoraPair,
    Mix,
    TargetGroup,
)


def page_bytes(shape: LinearShape, group: TargetGroup, dtype_size: int) -> int:
    """Bytes of one rank page of `group`, over all layers; `dtype_size` is in bytes an element."""
    elements = PAGE_RANK * (len(group.targets) * shape.group_input(group) + sum(shape.group_outputs(group)))
    return shape.num_layers * elements * dtype_size


def allocate_pages(
    shape: LinearShape, group: TargetGroup, count: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """a (layers, count, S * 16, in) and b (layers, count, 16, sum(out)) of zeros: the device's pages of one group."""
    layers, rows = shape.num_layers, len(group.targets) * PAGE_RANK
    return (
        torch.zeros(layers, count, rows, shape.group_input(group), device=device, dtype=dtype),
        torch.zeros(layers, count, PAGE_RANK, sum(shape.group_outputs(group)), device=device, dtype=dtype),
    )


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


def page_ranks(rank: int) -> tuple[int, ...]:
    """How many rank rows of each page an adapter of this rank uses."""
    return tuple(min(PAGE_RANK, rank - start) for start in range(0, rank, PAGE_RANK))


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
    """One adapter in one target group, as it is copied to the device: one (a, b) for each page, and one scale.

    a (layers, S, r, in), b (layers, r, sum(out)): only the r <= 16 rank rows that the page uses. Slices that the
    adapter does not touch are zero.
    """

    pages: tuple[tuple[Tensor, Tensor], ...]
    scale: float

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(b.shape[1] for _, b in self.pages)


@dataclass(frozen=True)
class PackedAdapter:
    """One adapter, or a fusion of some, in host memory: `groups` by name, without those that it does not touch."""

    digest: str
    groups: Mapping[str, PackedGroup]

    @cached_property
    def group_ranks(self) -> dict[str, int]:
        """As `AdapterWeights.group_ranks`."""
        return {name: sum(group.ranks) for name, group in self.groups.items()}

    @property
    def scales(self) -> dict[str, float]:
        return {name: group.scale for name, group in self.groups.items()}

    @cached_property
    def num_bytes(self) -> int:
        """Host memory that it takes, with what the allocator of page-locked memory rounds up."""
        return sum(_allocated(part) for group in self.groups.values() for page in group.pages for part in page)


def _allocated(tensor: Tensor) -> int:
    return 1 << (tensor.nbytes - 1).bit_length() if tensor.is_pinned() else tensor.nbytes


def empty_pages(
    shape: LinearShape, group: TargetGroup, rank: int, dtype: torch.dtype, *, pinned: bool = False
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Memory for the pages of an adapter of this rank, see `PackedGroup`; page-locked if `pinned`."""
    layers, inputs, outputs = shape.num_layers, shape.group_input(group), sum(shape.group_outputs(group))
    return tuple(
        (
            torch.empty(layers, len(group.targets), rows, inputs, dtype=dtype, pin_memory=pinned),
            torch.empty(layers, rows, outputs, dtype=dtype, pin_memory=pinned),
        )
        for rows in page_ranks(rank)
    )


def pack(weights: AdapterWeights, shape: LinearShape, dtype: torch.dtype, *, pinned: bool = False) -> PackedAdapter:
    """`weights` as rank pages in host memory, page-locked if `pinned`.

    Where the pairs of a group differ in scale, the most frequent one is the group's and the ratio goes into B.
    Raises AdapterError `adapter_not_finite` where values are too large for `dtype`.
    """
    groups = [group for group in GROUPS if group.name in weights.group_ranks]
    return PackedAdapter(
        weights.digest, {group.name: _pack_group(weights, shape, group, dtype, pinned) for group in groups}
    )


def _pack_group(
    weights: AdapterWeights, shape: LinearShape, group: TargetGroup, dtype: torch.dtype, pinned: bool
) -> PackedGroup:
    outputs, rank = shape.group_outputs(group), weights.group_ranks[group.name]
    pairs = {key: pair for key, pair in weights.pairs.items() if GROUP_OF[key[1]] is group}
    scale = _common_scale([pair.scale for pair in pairs.values()])
    pages = empty_pages(shape, group, rank, dtype, pinned=pinned)
    if len(pairs) < shape.num_layers * len(group.targets) or any(pair.rank < rank for pair in pairs.values()):
        for part in (part for page in pages for part in page):
            part.zero_()
    for (layer, target), pair in pairs.items():
        place = group.targets.index(target)
        first = sum(outputs[:place])
        transposed = pair.b.T if pair.scale == scale else pair.b.T.float() * (pair.scale / scale)
        for (a, b), start in zip(pages, range(0, pair.rank, PAGE_RANK), strict=False):
            rows = min(PAGE_RANK, pair.rank - start)
            a[layer, place, :rows] = pair.a[start : start + rows]
            b[layer, :rows, first : first + outputs[place]] = transposed[start : start + rows]
    if any(_may_overflow(pair, scale, dtype) for pair in pairs.values()):
        check_finite(pages, f"adapter {weights.digest[:12]}")
    return PackedGroup(pages, scale)


def check_finite(pages: tuple[tuple[Tensor, Tensor], ...], what: str) -> None:
    """Raise AdapterError `adapter_not_finite` for pages that hold infinity or NaN.

    Finite in the file is not enough: not in a dtype of less range, nor once a scale or a fusion is multiplied in. Rows
    of others may meet such a page with weight 0, and 0 times infinity is NaN.
    """
    for part in (part for page in pages for part in page):
        if not all(bound.isfinite() for bound in part.aminmax()):
            raise AdapterError("adapter_not_finite", f"{what} has values too large for {part.dtype}")


def _may_overflow(pair: LoraPair, scale: float, dtype: torch.dtype) -> bool:
    return pair.scale != scale or torch.finfo(pair.a.dtype).max > torch.finfo(dtype).max


def _common_scale(scales: list[float]) -> float:
    """The most frequent scale other than 0, which could not stand for the others; 0 if there is none."""
    nonzero = Counter(scale for scale in scales if scale)
    return nonzero.most_common(1)[0][0] if nonzero else 0.0
