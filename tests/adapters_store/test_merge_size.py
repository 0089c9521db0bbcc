"""What a merge will need, foretold from headers, against the merge itself."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.linear_names import Module
from adapters_store.merge_size import check_merge, unite
from adapters_store.merging import MergeMethod, MergeRecipe, merge
from adapters_store.peft_format import AdapterLayout
from adapters_store.registry import Resolved
from adapters_store.types import AdapterError, AdapterLimits, AdapterWeights, LinearShape
from tests.adapters_store.test_peft_write import random_weights

SHAPE = LinearShape(2, {"q_proj": 6, "down_proj": 5}, {"q_proj": 6, "down_proj": 4})
MODULES = [(layer, target) for layer in range(2) for target in ("q_proj", "down_proj")]
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def layout(weights: AdapterWeights) -> AdapterLayout:
    return AdapterLayout({module: (pair.rank, pair.a.dtype) for module, pair in weights.pairs.items()})


@settings(max_examples=60, deadline=None)
@given(
    adapters=st.lists(
        st.tuples(st.dictionaries(st.sampled_from(MODULES), st.integers(1, 9), min_size=1), DTYPES),
        min_size=1,
        max_size=4,
    ),
    method=st.sampled_from(["cat", "svd"]),
    rank=st.none() | st.integers(1, 9),
)
def test_it_foretells_the_size(
    adapters: list[tuple[Mapping[Module, int], torch.dtype]], method: str, rank: int | None
) -> None:
    given = [random_weights(SHAPE, dict(ranks), dtype=dtype, seed=i) for i, (ranks, dtype) in enumerate(adapters)]
    recipe = MergeRecipe.of([(each.digest, 0.3) for each in given], method, rank if method == "svd" else None)
    foretold = check_merge([layout(each) for each in given], recipe, SHAPE, AdapterLimits())
    merged = merge([(each, 0.3) for each in given], method, recipe.rank)
    widest = max(pair.a.element_size() for pair in merged.pairs.values())
    common = max(pair.a.element_size() for each in given for pair in each.pairs.values())
    mixed = {pair.a.dtype for each in given for pair in each.pairs.values()} >= {torch.float16, torch.bfloat16}
    assert merged.num_bytes == foretold * widest // (4 if mixed else common)


@pytest.mark.parametrize("method", MergeMethod)
def test_ranks_that_add_up_to_too_much(method: MergeMethod) -> None:
    layouts = [AdapterLayout({(1, "q_proj"): (4, torch.float32), (0, "down_proj"): (4, torch.float32)})] * 2
    recipe = MergeRecipe.of([("a", 1.0), ("b", 1.0)], method, density=0.5 if method.prunes else None)
    most = 8 if method in (MergeMethod.CAT, MergeMethod.SVD) else 1
    check_merge(layouts, recipe, SHAPE, AdapterLimits(max_rank=most))
    if most > 1:
        with pytest.raises(
            AdapterError, match=r"ranks of model\.layers\.\d\.\w+\.\w+ add up to 8: expected at most 7"
        ) as caught:
            check_merge(layouts, recipe, SHAPE, AdapterLimits(max_rank=7))
    else:
        with pytest.raises(AdapterError, match="add up to 16: expected at most 8") as caught:
            check_merge(layouts * 2, recipe, SHAPE, AdapterLimits(max_rank=1))
    assert (caught.value.code, caught.value.status) == ("adapter_unsupported", 422)


def test_bytes_are_bounded_as_if_cat_had_to_round() -> None:
    one = AdapterLayout({(0, "q_proj"): (4, torch.float16)})
    cat, svd = (MergeRecipe.of([("a", 1.0), ("b", 1.0)], method) for method in ("cat", "svd"))
    assert check_merge([one, one], cat, SHAPE, AdapterLimits(max_bytes=8 * 12 * 4)) == 8 * 12 * 2
    with pytest.raises(AdapterError, match="would have 384 bytes: expected at most 383") as caught:
        check_merge([one, one], cat, SHAPE, AdapterLimits(max_bytes=8 * 12 * 4 - 1))
    assert (caught.value.code, caught.value.status) == ("adapter_too_large", 413)
    assert check_merge([one, one], svd, SHAPE, AdapterLimits(max_bytes=4 * 12 * 2)) == 4 * 12 * 2
    with pytest.raises(AdapterError, match="expected at most 95"):
        check_merge([one, one], svd, SHAPE, AdapterLimits(max_bytes=4 * 12 * 2 - 1))


def test_equal_digests_are_united_in_order() -> None:
    a, copy, b = (
        Resolved("t", name, digest * 64, False, "c", "w") for name, digest in (("a", "0"), ("copy", "0"), ("b", "1"))
    )
    assert unite([(b, 1.0), (copy, 0.5), (a, 0.25)]) == [(b, 1.0), (copy, 0.75)]
    with pytest.raises(AdapterError, match="'copy' add up to 0"):
        unite([(copy, 0.5), (b, 1.0), (a, -0.5)])
