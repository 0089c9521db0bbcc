"""Fusion against the explicit formula."""

import pytest
import torch

from adapters_store.merge import fuse
from adapters_store.types import AdapterWeights, Composition, LoraPair, Mix


def adapter(digest: str, ranks: dict[tuple[int, str], int], scale: float, dtype: torch.dtype) -> AdapterWeights:
    generator = torch.Generator().manual_seed(ord(digest))
    return AdapterWeights(
        digest,
        {
            module: LoraPair(
                torch.randn(rank, 6, generator=generator).to(dtype),
                torch.randn(5, rank, generator=generator).to(dtype),
                scale,
            )
            for module, rank in ranks.items()
        },
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fuse_is_the_product_of_weighted_sums(dtype: torch.dtype) -> None:
    modules = [(0, "q_proj"), (1, "q_proj"), (1, "down_proj")]
    first = adapter("a", dict(zip(modules, (2, 3, 4), strict=True)), 2.0, dtype)
    second = adapter("b", {modules[0]: 5, modules[2]: 1}, 0.5, torch.float32)
    third = adapter("c", {modules[1]: 3}, -1.5, torch.float32)
    terms = [(first, 0.75), (second, -0.25), (third, 0.5)]
    fused = fuse(terms)
    assert set(fused.pairs) == set(modules)
    for module, rank in zip(modules, (5, 3, 4), strict=True):
        a, b = torch.zeros(rank, 6, dtype=torch.float64), torch.zeros(5, rank, dtype=torch.float64)
        for weights, weight in terms:
            if module in weights.pairs:
                pair = weights.pairs[module]
                padding = rank - pair.rank
                a += weight * torch.nn.functional.pad(pair.a.double(), (0, 0, 0, padding))
                b += weight * pair.scale * torch.nn.functional.pad(pair.b.double(), (0, padding))
        pair = fused.pairs[module]
        assert (pair.rank, pair.scale, pair.a.dtype, pair.b.dtype) == (rank, 1.0, dtype, dtype)
        tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
        torch.testing.assert_close(pair.a.double(), a, **tolerance)
        torch.testing.assert_close(pair.b.double(), b, **tolerance)


def test_digest_is_the_mixs_and_dtype_can_be_chosen() -> None:
    one, two = (adapter(digest, {(0, "q_proj"): 2}, 1.0, torch.bfloat16) for digest in "ab")
    mix = Mix.of([("b", 1.0), ("a", 3.0)], Composition.FUSION)
    fused = fuse([(two, 0.25), (one, 0.75)], torch.float32)
    assert fused.digest == mix.digest
    assert fused.pairs[0, "q_proj"].a.dtype == torch.float32
    exact = 0.75 * one.pairs[0, "q_proj"].a.float() + 0.25 * two.pairs[0, "q_proj"].a.float()
    torch.testing.assert_close(fused.pairs[0, "q_proj"].a, exact)


def test_nothing_to_fuse() -> None:
    with pytest.raises(ValueError, match="at least one"):
        fuse([])
