"""How large a merge will be, from the headers of its adapters: before any of them is read."""

from collections import defaultdict
from collections.abc import Sequence
from functools import reduce

import torch

from adapters_store.linear_names import Module, module_path
from adapters_store.merging import MergeMethod, MergeRecipe
from adapters_store.peft_format import AdapterLayout
from adapters_store.registry import Resolved
from adapters_store.types import AdapterError, AdapterLimits, LinearShape

STACKED = 8
"""Times the largest rank that the ranks of a linear may add up to where factors are summed, not put side by side."""


def unite(entries: Sequence[tuple[Resolved, float]]) -> list[tuple[Resolved, float]]:
    """One entry for each digest, under the first of its names, with the sum of the weights.

    Raises AdapterError `invalid_merge` (400) where they add up to 0.
    """
    united: dict[str, tuple[Resolved, float]] = {}
    for adapter, weight in entries:
        first, so_far = united.get(adapter.digest, (adapter, 0.0))
        united[adapter.digest] = first, so_far + weight
    for adapter, weight in united.values():
        if not weight:
            message = f"the weights of adapter {adapter.name!r} add up to 0: expected another sum"
            raise AdapterError("invalid_merge", message, 400, "adapters")
    return list(united.values())


def check_merge(
    layouts: Sequence[AdapterLayout], recipe: MergeRecipe, shape: LinearShape, limits: AdapterLimits
) -> int:
    """Bytes of the factors of the merge of these adapters, in their common dtype.

    Raises AdapterError `adapter_unsupported` (422) where the ranks of one linear add up to too much, which bounds the
    time of `svd` too, and `adapter_too_large` (413) where the factors may exceed the limit: `cat` may need fp32.
    """
    stacked: defaultdict[Module, list[int]] = defaultdict(list)
    for layout in layouts:
        for module, (rank, _) in layout.modules.items():
            stacked[module].append(rank)
    sums = recipe.method not in (MergeMethod.CAT, MergeMethod.SVD)
    most = limits.max_rank * (STACKED if sums else 1)
    for module, ranks in stacked.items():
        if sum(ranks) > most:
            raise AdapterError(
                "adapter_unsupported",
                f"the adapters' ranks of {module_path(*module)} add up to {sum(ranks)}: "
                f"expected at most {most} for {recipe.method}",
            )
    largest = recipe.rank or max(max(ranks) for ranks in stacked.values())
    numbers = 0
    for (_, target), ranks in stacked.items():
        inputs, outputs = shape.inputs[target], shape.outputs[target]
        rank = sum(ranks) if recipe.method is MergeMethod.CAT else max(ranks)
        if recipe.method is MergeMethod.SVD:
            rank = min(largest, sum(ranks), inputs, outputs)
        numbers += rank * (inputs + outputs)
    dtype = reduce(torch.promote_types, {dtype for layout in layouts for _, dtype in layout.modules.values()})
    width = torch.float32.itemsize if recipe.method is MergeMethod.CAT else dtype.itemsize
    if numbers * width > limits.max_bytes:
        raise AdapterError(
            "adapter_too_large",
            f"the merged adapter would have {numbers * width} bytes: expected at most {limits.max_bytes}",
            413,
        )
    return numbers * dtype.itemsize
