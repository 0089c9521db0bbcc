"""Fusion against the explicit formula."""

import pytest
import torch

from adapters_store.merge import fuse
from adapters_store.pages import PackedAdapter, pack
from adapters_store.types import GROUPS, TARGETS, AdapterError, AdapterWeights, Composition, LinearShape, LoraPair, Mix

SHAPE = LinearShape(2, dict.fromkeys(TARGETS, 6), dict.fromkeys(TARGETS, 5))
MODULES = [(0, "q_proj"), (1, "q_proj"), (1, "down_proj"), (1, "v_proj")]


def adapter(digest: str, ranks: dict[tuple[int, str], int], scale: float, dtype: torch.dtype) -> AdapterWeights:
    """The scale of `v_proj` is half of that of the others."""
    generator = torch.Generator().manual_seed(ord(digest))
    pairs = {}
    for module, rank in ranks.items():
        a, b = torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator)
        pairs[module] = LoraPair(a.to(dtype), b.to(dtype), scale / 2 if module[1] == "v_proj" else scale)
    return AdapterWeights(digest, pairs)


def unpacked(packed: PackedAdapter, layer: int, target: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank), with the scale in B."""
    group = next(group for group in GROUPS if target in group.targets)
    place, pages = group.targets.index(target), packed.groups[group.name].pages
    a = torch.cat([page[layer, place] for page, _ in pages]).double()
    b = torch.cat([page[layer, :, 5 * place : 5 * place + 5].T for _, page in pages], dim=1).double()
    return a, b * packed.groups[group.name].scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fuse_is_the_product_of_weighted_sums(dtype: torch.dtype) -> None:
    first = adapter("a", dict(zip(MODULES, (2, 3, 4, 1), strict=True)), 2.0, dtype)
    second = adapter("b", {MODULES[0]: 35, MODULES[2]: 1, MODULES[3]: 4}, 0.5, torch.float32)
    third = adapter("c", {MODULES[1]: 18}, -1.5, torch.float32)
    terms = [(first, 0.75), (second, -0.25), (third, 0.5)]
    fused = fuse([(pack(weights, SHAPE, torch.float32), weight) for weights, weight in terms], SHAPE, dtype)
    assert fused.group_ranks == {"qkv": 35, "down": 4}
    assert fused.scales == {"qkv": 1.0, "down": 1.0}
    for module, rank in zip(MODULES, (35, 35, 4, 35), strict=True):
        a, b = torch.zeros(rank, 6, dtype=torch.float64), torch.zeros(5, rank, dtype=torch.float64)
        for weights, weight in terms:
            if module in weights.pairs:
                pair = weights.pairs[module]
                padding = rank - pair.rank
                a += weight * torch.nn.functional.pad(pair.a.double(), (0, 0, 0, padding))
                b += weight * pair.scale * torch.nn.functional.pad(pair.b.double(), (0, padding))
        tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
        found_a, found_b = unpacked(fused, *module)
        torch.testing.assert_close(found_a, a, **tolerance)
        torch.testing.assert_close(found_b, b, **tolerance)
    _, page = fused.groups["qkv"].pages[0]
    assert page.dtype == dtype
    assert not page[:, :, 5:10].any(), "nobody touches k_proj"


def test_digest_is_the_mixs() -> None:
    one, two = (pack(adapter(d, {(0, "q_proj"): 2}, 1.0, torch.float32), SHAPE, torch.float32) for d in "ab")
    mix = Mix.of([("b", 1.0), ("a", 3.0)], Composition.FUSION)
    assert fuse([(two, 0.25), (one, 0.75)], SHAPE, torch.float32).digest == mix.digest


def test_a_fusion_that_overflows_is_refused() -> None:
    packed = pack(adapter("a", {(0, "q_proj"): 2}, 1.0, torch.float32), SHAPE, torch.float32)
    with pytest.raises(AdapterError, match="the fusion of 2 adapters has values too large") as refused:
        fuse([(packed, 1e38), (packed, 3.4e38)], SHAPE, torch.float32)
    assert refused.value.code == "adapter_not_finite"


def test_nothing_to_fuse() -> None:
    with pytest.raises(ValueError, match="at least one"):
        fuse([], SHAPE, torch.float32)
