"""Sizes of rank pages and what is in them."""

from dataclasses import replace

import pytest
import torch

from adapters_store.pages import pack, page_bytes, page_ranks, pages_needed, plan_pages, rank_pages
from adapters_store.pool import PagePool
from adapters_store.types import (
    DOWN,
    GROUPS,
    QKV,
    AdapterError,
    AdapterWeights,
    Composition,
    LinearShape,
    LoraPair,
    Mix,
)


def test_page_bytes(shape: LinearShape) -> None:
    assert page_bytes(shape, QKV, 4) == 2 * 16 * (3 * 16 + 16 + 8 + 8) * 4
    assert page_bytes(shape, DOWN, 2) == 2 * 16 * (24 + 16) * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planned_memory_is_the_pools_memory(shape: LinearShape, dtype: torch.dtype) -> None:
    one_of_each = sum(page_bytes(shape, group, dtype.itemsize) for group in GROUPS)
    budget = 7 * one_of_each + one_of_each - 1
    plan = plan_pages(shape, budget, dtype.itemsize)
    assert plan == {"qkv": 7, "o": 7, "gate_up": 7, "down": 7}
    assert PagePool(shape, plan, torch.device("cpu"), dtype).num_bytes == 7 * one_of_each
    assert plan_pages(shape, one_of_each, dtype.itemsize)["o"] == 1
    with pytest.raises(ValueError, match="too small"):
        plan_pages(shape, one_of_each - 1, dtype.itemsize)


def test_pages_needed() -> None:
    ranks = {"a": {"qkv": 16, "down": 17}, "b": {"qkv": 33}, "c": {"o": 1}}
    assert rank_pages(ranks["a"]) == {"qkv": 1, "down": 2}
    entries = (("a", 0.5), ("b", 0.25), ("c", 0.25))
    assert pages_needed(Mix(entries), ranks) == {"qkv": 4, "o": 1, "gate_up": 0, "down": 2}
    assert pages_needed(Mix(entries, Composition.FUSION), ranks) == {"qkv": 3, "o": 1, "gate_up": 0, "down": 2}
    assert pages_needed(Mix(), ranks) == dict.fromkeys(("qkv", "o", "gate_up", "down"), 0)


def test_pack_places_slices_and_ranks(shape: LinearShape) -> None:
    """Rank 18 of v_proj in layer 1: 16 rank rows in one page and 2 in another, all other slices zero."""
    a, b = torch.randn(18, 16), torch.randn(8, 18)
    packed = pack(AdapterWeights("x", {(1, "v_proj"): LoraPair(a, b, 0.5)}), shape, torch.float32)
    assert set(packed.groups) == {"qkv"}
    assert packed.group_ranks == {"qkv": 18}
    group = packed.groups["qkv"]
    assert (group.scale, group.ranks) == (0.5, (16, 2))
    (first_a, first_b), (second_a, second_b) = group.pages
    assert (first_a.shape, first_b.shape) == ((2, 3, 16, 16), (2, 16, 32))
    assert (second_a.shape, second_b.shape) == ((2, 3, 2, 16), (2, 2, 32))
    assert torch.equal(torch.cat([first_a[1, 2], second_a[1, 2]]), a)
    assert torch.equal(torch.cat([first_b[1, :, 24:], second_b[1, :, 24:]]), b.T)
    assert first_a.count_nonzero() + second_a.count_nonzero() == a.numel()
    assert first_b.count_nonzero() + second_b.count_nonzero() == b.numel()
    assert packed.num_bytes == 4 * sum(part.numel() for page in group.pages for part in page)


def test_rank_rows_that_some_linears_lack_are_zero(shape: LinearShape) -> None:
    """Memory is not zero when it is new, so that each of these must be written."""
    pairs = {
        (layer, target): LoraPair(torch.ones(rank, 16), torch.ones(out, rank), 1.0)
        for layer in range(2)
        for target, out, rank in (("q_proj", 16, 20), ("k_proj", 8, 3), ("v_proj", 8, 17))
    }
    for _ in range(3):
        torch.empty(200_000).fill_(torch.nan)
        group = pack(AdapterWeights("x", pairs), shape, torch.float32).groups["qkv"]
        assert sum(int(a.sum()) for a, _ in group.pages) == 2 * 16 * (20 + 3 + 17)
        assert sum(int(b.sum()) for _, b in group.pages) == 2 * (16 * 20 + 8 * 3 + 8 * 17)


@pytest.mark.parametrize(
    ("scales", "common"),
    [((2.0, 2.0, 0.5), 2.0), ((0.0, 0.0, 3.0), 3.0), ((0.0, 0.0, 0.0), 0.0), ((-1.0, -1.0, 0.0), -1.0)],
)
def test_pack_folds_differing_scales_into_b(
    shape: LinearShape, scales: tuple[float, float, float], common: float
) -> None:
    sizes = zip(("q_proj", "k_proj", "v_proj"), (16, 8, 8), scales, strict=True)
    pairs = {(0, name): LoraPair(torch.randn(4, 16), torch.randn(out, 4), scale) for name, out, scale in sizes}
    group = pack(AdapterWeights("x", pairs), shape, torch.float32).groups["qkv"]
    assert group.scale == common
    columns = {"q_proj": slice(0, 16), "k_proj": slice(16, 24), "v_proj": slice(24, 32)}
    for (_, name), pair in pairs.items():
        torch.testing.assert_close(group.pages[0][1][0, :, columns[name]] * group.scale, pair.b.T * pair.scale)


@pytest.mark.parametrize("overflow", ["a", "b", "ratio"])
def test_weights_that_do_not_fit_the_dtype_are_refused(shape: LinearShape, overflow: str) -> None:
    """Finite as stored, but not as pages: rows of other requests may be multiplied with them, by 0."""
    a, b = torch.randn(4, 16), torch.full((16, 4), 1e30)
    if overflow != "ratio":
        (a if overflow == "a" else b).fill_(3.4e38)
    pairs = {(0, "q_proj"): LoraPair(a, b, 1e20), (1, "q_proj"): LoraPair(torch.ones(4, 16), b, 1.0)}
    pairs[0, "k_proj"] = LoraPair(torch.randn(4, 16), torch.randn(8, 4), 1.0)
    with pytest.raises(AdapterError, match="too large") as error:
        pack(AdapterWeights("x", pairs), shape, torch.bfloat16)
    assert error.value.code == "adapter_not_finite"
    one_scale = {key: replace(pair, scale=1.0) for key, pair in pairs.items()}
    assert pack(AdapterWeights("x", one_scale), shape, torch.float32).groups


def test_page_ranks() -> None:
    assert [page_ranks(rank) for rank in (1, 16, 17, 40)] == [(1,), (16,), (16, 1), (16, 16, 8)]
