"""Packed adapters in their pages. The way to a GPU is tested on one, in tests/gpu."""

import torch

from adapters_store.pages import pack
from adapters_store.types import GROUPS
from adapters_store.upload import write_pages
from tests.adapters_store.library import HIDDEN, KEYS, LIBRARY, SHAPE, adapter, make_pool


def test_pages_of_another_adapter_are_zero_where_unused() -> None:
    pool = make_pool(3)
    everywhere = {group.name: (0, 1, 2) for group in GROUPS}
    write_pages(pack(adapter("full", 48), SHAPE, torch.float64), everywhere, pool.tensors)
    assert all(part.all() for pair in pool.tensors.values() for part in pair)
    small = pack(adapter("n", 3, ("k_proj", "up_proj")), SHAPE, torch.float64)
    write_pages(small, {"qkv": (1,), "gate_up": (2,)}, pool.tensors)
    a, b = pool.tensors["qkv"]
    assert a[:, 1].count_nonzero() == a[:, 1, 16:19].count_nonzero() == 2 * 3 * HIDDEN
    assert b[:, 1].count_nonzero() == b[:, 1, :3, HIDDEN : HIDDEN + KEYS].count_nonzero() == 2 * 3 * KEYS
    assert a[:, [0, 2]].all(), "other pages are left alone"
    assert pool.tensors["o"][0].all()


def test_pages_are_written_in_their_order() -> None:
    pool = make_pool(4)
    weights = LIBRARY["04"]
    write_pages(pack(weights, SHAPE, torch.float64), {"qkv": (3, 0, 2)}, pool.tensors)
    a, _ = pool.tensors["qkv"]
    slices = a[1, [3, 0, 2], 16:32].flatten(0, 1)
    assert torch.equal(slices[:33], weights.pairs[1, "k_proj"].a)
    assert not slices[33:].any()
    assert a[:, 1].isnan().all()
