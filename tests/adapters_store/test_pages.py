"""Sizes of rank pages and what is in them."""

import pytest
import torch

from adapters_store.pages import pack, page_bytes, pages_needed, plan_pages, rank_pages
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
    """Rank 18 of v_proj in layer 1: rows 32.. of two pages, the last 14 rank rows and all other slices zero."""
    a, b = torch.randn(18, 16), torch.randn(8, 18)
    packed = pack(AdapterWeights("x", {(1, "v_proj"): LoraPair(a, b, 0.5)}), shape, torch.float32)
    assert set(packed) == {"qkv"}
    group = packed["qkv"]
    assert (group.a.shape, group.b.shape, group.scale) == ((2, 2, 48, 16), (2, 2, 16, 32), 0.5)
    assert torch.equal(group.a[1, 0, 32:48], a[:16])
    assert torch.equal(group.a[1, 1, 32:34], a[16:])
    assert torch.equal(group.b[1, 0, :, 24:], b.T[:16])
    assert torch.equal(group.b[1, 1, :2, 24:], b.T[16:])
    assert group.a.count_nonzero() == a.numel()
    assert group.b.count_nonzero() == b.numel()


@pytest.mark.parametrize(
    ("scales", "common"),
    [((2.0, 2.0, 0.5), 2.0), ((0.0, 0.0, 3.0), 3.0), ((0.0, 0.0, 0.0), 0.0), ((-1.0, -1.0, 0.0), -1.0)],
)
def test_pack_folds_differing_scales_into_b(
    shape: LinearShape, scales: tuple[float, float, float], common: float
) -> None:
    sizes = zip(("q_proj", "k_proj", "v_proj"), (16, 8, 8), scales, strict=True)
    pairs = {(0, name): LoraPair(torch.randn(4, 16), torch.randn(out, 4), scale) for name, out, scale in sizes}
    group = pack(AdapterWeights("x", pairs), shape, torch.float32)["qkv"]
    assert group.scale == common
    columns = {"q_proj": slice(0, 16), "k_proj": slice(16, 24), "v_proj": slice(24, 32)}
    for (_, name), pair in pairs.items():
        torch.testing.assert_close(group.b[0, 0, :4, columns[name]] * group.scale, pair.b.T * pair.scale)


def test_pages_of_rank_18_say_how_many_of_their_ranks_are_used(shape: LinearShape) -> None:
    pairs = {(0, "o_proj"): LoraPair(torch.randn(18, 16), torch.randn(16, 18), 1.0)}
    assert pack(AdapterWeights("x", pairs), shape, torch.float32)["o"].ranks == (16, 2)


@pytest.mark.parametrize("overflow", ["dtype", "ratio"])
def test_weights_that_do_not_fit_the_dtype_are_refused(shape: LinearShape, overflow: str) -> None:
    """Finite as stored, but not as pages: rows of other requests may be multiplied with them, by 0."""
    b = torch.full((16, 4), 3.4e38 if overflow == "dtype" else 1e30)
    pairs = {(0, "q_proj"): LoraPair(torch.randn(4, 16), b, 1e20), (1, "q_proj"): LoraPair(torch.ones(4, 16), b, 1.0)}
    pairs[0, "k_proj"] = LoraPair(torch.randn(4, 16), torch.randn(8, 4), 1.0)
    with pytest.raises(AdapterError, match="too large") as error:
        pack(AdapterWeights("x", pairs), shape, torch.bfloat16)
    assert error.value.code == "adapter_not_finite"
