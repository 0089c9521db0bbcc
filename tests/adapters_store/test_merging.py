"""Merges against PEFT's `add_weighted_adapter` where it is right, against sums of products elsewhere."""

import math
from collections.abc import Sequence
from typing import Any

import peft.tuners.lora.model as peft_model
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

from adapters_store.linear_names import module_path
from adapters_store.merging import MergeMethod, MergeRecipe, merge
from adapters_store.types import TARGETS, AdapterError, AdapterWeights, LoraPair

Module = tuple[int, str]
PATHS = {module_path(layer, target): (layer, target) for layer in range(2) for target in TARGETS}
DENSITY = {method: 0.4 if method.prunes else None for method in MergeMethod}
BY_FACTORS = [method for method in MergeMethod if method not in ("cat", "svd")]


def in_peft(*configs: dict[str, Any]) -> PeftModel:
    """A tiny model of two layers with one random adapter per config, named 0, 1, 2 ..."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    lora = [LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | config) for config in configs]
    model = get_peft_model(base, lora[0], "0")
    for number, config in enumerate(lora[1:], 1):
        model.add_adapter(str(number), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model


def weights_of(model: PeftModel, name: str) -> AdapterWeights:
    pairs = {}
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            a, b = (factors[name].weight.detach().clone() for factors in (layer.lora_A, layer.lora_B))
            pairs[PATHS[path]] = LoraPair(a, b, layer.scaling[name])
    return AdapterWeights(name, pairs)


def both(
    model: PeftModel, weights: Sequence[float], method: MergeMethod, rank: int | None = None, seed: int = 0
) -> tuple[AdapterWeights, AdapterWeights]:
    """The model's adapters merged by us and by PEFT, which draws from the global generator, here seeded by `seed`."""
    names = [str(number) for number in range(len(weights))]
    adapters = [(weights_of(model, name), weight) for name, weight in zip(names, weights, strict=True)]
    ours = merge(adapters, method, rank, DENSITY[method], seed)
    with pytest.MonkeyPatch.context() as patch:
        freeze = peft_model._freeze_adapter
        # Called between the new adapter's own initialisation and the first draw.
        patch.setattr(peft_model, "_freeze_adapter", lambda *args: (freeze(*args), torch.manual_seed(seed)))
        model.add_weighted_adapter(names, list(weights), "merged", method.value, svd_rank=rank, density=DENSITY[method])
    return ours, weights_of(model, "merged")


def random_adapter(
    digest: str,
    ranks: dict[Module, int],
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    inputs: int = 12,
    outputs: int = 10,
) -> AdapterWeights:
    generator = torch.Generator().manual_seed(sum(map(ord, digest)))
    pairs = {
        module: LoraPair(
            torch.randn(rank, inputs, generator=generator).to(dtype),
            torch.randn(outputs, rank, generator=generator).to(dtype),
            scale,
        )
        for module, rank in ranks.items()
    }
    return AdapterWeights(digest, pairs)


def delta(pair: LoraPair) -> torch.Tensor:
    return pair.scale * pair.b.double() @ pair.a.double()


def exact(adapters: Sequence[tuple[AdapterWeights, float]], module: Module) -> torch.Tensor:
    return torch.stack([w * delta(weights.pairs[module]) for weights, w in adapters if module in weights.pairs]).sum(0)


def assert_products_equal(actual: AdapterWeights, expected: AdapterWeights, tolerance: float = 1e-5) -> None:
    assert set(actual.pairs) == set(expected.pairs)
    for module, pair in actual.pairs.items():
        other = delta(expected.pairs[module])
        torch.testing.assert_close(delta(pair), other, rtol=0, atol=tolerance * float(other.norm()))


CONFIGS = [
    {"target_modules": ["q_proj", "down_proj", "v_proj"]},
    {"target_modules": ["q_proj", "up_proj", "down_proj"], "lora_alpha": 3},
    {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16, "use_rslora": True},
]


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1.0, -0.75, 2.0)])
@pytest.mark.parametrize("method", MergeMethod)
def test_equals_peft(method: MergeMethod, weights: tuple[float, ...]) -> None:
    ours, theirs = both(in_peft(*CONFIGS), weights, method, seed=7)
    assert_products_equal(ours, theirs)
    if method in BY_FACTORS:
        for module, pair in ours.pairs.items():
            assert pair.scale == theirs.pairs[module].scale == 1
            torch.testing.assert_close(pair.a, theirs.pairs[module].a)
            torch.testing.assert_close(pair.b, theirs.pairs[module].b)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_mixed_ranks_equal_peft(method: str) -> None:
    configs = [{"r": 2}, {"r": 8, "rank_pattern": {"layers.1.self_attn.q_proj": 3}}, {"r": 1, "lora_alpha": 5}]
    ours, theirs = both(in_peft(*configs), (0.5, -1.0, 2.0), MergeMethod(method))
    assert_products_equal(ours, theirs)
    expected = {"cat": [11, 6], "svd": [8, 6]}[method]
    assert [ours.pairs[layer, "q_proj"].rank for layer in range(2)] == expected


def test_svd_of_given_rank_equals_peft() -> None:
    ours, theirs = both(in_peft(*CONFIGS), (1.0, 0.5, 0.25), MergeMethod.SVD, rank=3)
    assert {pair.rank for pair in ours.pairs.values()} == {3}
    assert_products_equal(ours, theirs)


def test_methods_apply_to_one_adapter_too() -> None:
    """PEFT's sums ignore method, rank and density for one adapter."""
    one = random_adapter("a", {(0, "q_proj"): 4}, scale=2.0)
    pair = one.pairs[0, "q_proj"]
    u, s, vh = torch.linalg.svd(1.5 * delta(pair))
    small = merge([(one, 1.5)], "svd", rank=1).pairs[0, "q_proj"]
    torch.testing.assert_close(delta(small), u[:, :1] * s[:1] @ vh[:1], rtol=1e-5, atol=1e-5)
    pruned = merge([(one, 0.5)], "magnitude_prune", density=0.25).pairs[0, "q_proj"]
    threshold = pair.a.abs().flatten().sort(descending=True).values[pair.a.numel() // 4]
    assert torch.equal(pruned.a, torch.where(pair.a.abs() > threshold, pair.a, 0.0))


def test_first_adapters_rslora_and_layers_do_not_spread() -> None:
    """PEFT's result takes both from the first config: too large by sqrt(rank), and without the others' layers."""
    configs = [{"use_rslora": True, "layers_to_transform": [0]}, {"layers_to_transform": [1]}]
    model = in_peft(*configs)
    adapters = [(weights_of(model, "0"), 0.5), (weights_of(model, "1"), 2.0)]
    ours, theirs = both(model, (0.5, 2.0), MergeMethod.LINEAR)
    assert set(theirs.pairs) == {(0, "q_proj")}
    assert theirs.pairs[0, "q_proj"].scale == 2
    assert set(ours.pairs) == {(0, "q_proj"), (1, "q_proj")}
    for module, pair in ours.pairs.items():
        torch.testing.assert_close(delta(pair), exact(adapters, module), rtol=1e-5, atol=1e-5)


RANKS = st.dictionaries(st.sampled_from([(0, "q_proj"), (0, "o_proj"), (1, "q_proj")]), st.integers(1, 7), min_size=1)
WEIGHTS = st.floats(-4, 4).filter(lambda weight: abs(weight) > 0.01)
ADAPTERS = st.lists(st.tuples(RANKS, st.sampled_from([0.0, 0.5, 1.0, 2.0, 1.7]), WEIGHTS), min_size=1, max_size=4).map(
    lambda rows: [(random_adapter(f"adapter {i}", ranks, scale), w) for i, (ranks, scale, w) in enumerate(rows)]
)


@settings(max_examples=60, deadline=None)
@given(adapters=ADAPTERS, rank=st.none() | st.integers(1, 12))
def test_cat_is_exact_and_svd_the_best_of_its_rank(
    adapters: list[tuple[AdapterWeights, float]], rank: int | None
) -> None:
    cat, svd = merge(adapters, "cat"), merge(adapters, "svd", rank=rank)
    largest = rank or max(pair.rank for weights, _ in adapters for pair in weights.pairs.values())
    assert set(cat.pairs) == set(svd.pairs) == {module for weights, _ in adapters for module in weights.pairs}
    for module, pair in cat.pairs.items():
        expected = exact(adapters, module)
        torch.testing.assert_close(delta(pair), expected, rtol=0, atol=1e-6 * float(expected.norm()))
        total = sum(weights.pairs[module].rank for weights, _ in adapters if module in weights.pairs)
        assert pair.rank == total
        # Eckart and Young: no matrix of this rank comes closer than the singular values left out.
        chosen = svd.pairs[module]
        assert chosen.rank == min(largest, total, 10)
        values = torch.linalg.svdvals(expected)
        error = float((expected - delta(chosen)).norm())
        assert error == pytest.approx(float(values[chosen.rank :].norm()), abs=1e-5 * float(values.norm()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cat_keeps_a_small_dtype_only_where_nothing_is_lost(dtype: torch.dtype) -> None:
    module = (0, "q_proj")
    adapters = [random_adapter(name, {module: 3}, 2.0, dtype) for name in "abc"]
    even = merge([(weights, 1 / 3) for weights in adapters], "cat").pairs[module]
    assert (even.a.dtype, even.b.dtype, even.scale) == (dtype, dtype, 2 / 3)
    assert torch.equal(even.a, torch.cat([weights.pairs[module].a for weights in adapters]))
    uneven = list(zip(adapters, (0.3, 0.6, 0.7), strict=True))
    pair = merge(uneven, "cat").pairs[module]
    assert pair.a.dtype == pair.b.dtype == torch.float32
    torch.testing.assert_close(delta(pair), exact(uneven, module), rtol=1e-6, atol=1e-5)
    assert merge(uneven, "linear").pairs[module].a.dtype == dtype
    mixed = [(adapters[0], 1.0), (random_adapter("d", {module: 3}), 1.0)]
    assert merge(mixed, "svd").pairs[module].b.dtype == torch.float32


@pytest.mark.parametrize("method", BY_FACTORS)
def test_density_one_keeps_everything(method: MergeMethod) -> None:
    module = (0, "q_proj")
    adapters = [(random_adapter(name, {module: 3}, 2.0), 0.5) for name in "ab"]
    merged = merge(adapters, method, density=1.0 if method.prunes else None).pairs[module]
    a, b = (torch.stack([getattr(weights.pairs[module], name) for weights, _ in adapters]) for name in "ab")
    for actual, factors in ((merged.a, a), (merged.b, b)):
        agree = factors.sign() == factors.sum(0).sign()
        mean = (factors * agree).sum(0) / agree.sum(0)
        torch.testing.assert_close(actual, mean if method in ("ties", "dare_ties") else factors.sum(0))


def test_opposite_signs_elect_plus_and_agreeing_ones_average() -> None:
    rows = torch.tensor([[1.0, -2.0, 3.0, 0.0], [-1.0, -4.0, 1.0, 0.0]])
    adapters = [
        (AdapterWeights(str(i), {(0, "q_proj"): LoraPair(row[None], torch.ones(1, 1), 1.0)}), 1.0)
        for i, row in enumerate(rows)
    ]
    assert merge(adapters, "ties", density=1).pairs[0, "q_proj"].a.tolist() == [[1.0, -3.0, 2.0, 0.0]]


@settings(max_examples=25, deadline=None)
@given(density=st.floats(0.05, 0.95), seed=st.integers(0, 2**63 - 1))
def test_dare_keeps_and_rescales_by_its_seed(density: float, seed: int) -> None:
    module = (0, "q_proj")
    one = random_adapter("a", {module: 16}, inputs=64)
    merged = merge([(one, 1.0)], "dare_linear", density=density, seed=seed).pairs[module]
    again = merge([(one, 1.0)], "dare_linear", density=density, seed=seed).pairs[module]
    other = merge([(one, 1.0)], "dare_linear", density=density, seed=(seed + 1) % 2**63).pairs[module]
    assert torch.equal(merged.a, again.a)
    assert not torch.equal(merged.a, other.a)
    kept = merged.a != 0
    torch.testing.assert_close(merged.a, torch.where(kept, one.pairs[module].a / density, 0.0))
    deviation = math.sqrt(density * (1 - density) / kept.numel())
    assert abs(float(kept.float().mean()) - density) < 6 * deviation


@settings(max_examples=25, deadline=None)
@given(density=st.floats(0.01, 1))
def test_magnitude_pruning_keeps_the_largest(density: float) -> None:
    module = (0, "q_proj")
    one = random_adapter("a", {module: 5})
    merged = merge([(one, 1.0)], "magnitude_prune", density=density).pairs[module]
    for actual, factor in ((merged.a, one.pairs[module].a), (merged.b, one.pairs[module].b)):
        kept = actual != 0
        assert int(kept.sum()) == int(density * factor.numel())
        assert torch.equal(actual[kept], factor[kept])
        if 0 < int(kept.sum()) < kept.numel():
            assert factor.abs()[kept].min() >= factor.abs()[~kept].max()


@settings(max_examples=25, deadline=None)
@given(adapters=ADAPTERS, method=st.sampled_from(["cat", "svd"]))
def test_order_does_not_change_the_sum(adapters: list[tuple[AdapterWeights, float]], method: str) -> None:
    assert_products_equal(merge(adapters, method), merge(adapters[::-1], method), 1e-4 if method == "svd" else 1e-6)


def test_recipe_and_digest() -> None:
    entries = [("x", 1), ("y", -0.5)]
    recipe = MergeRecipe.of(entries, "dare_ties", density=0.5, seed=3)
    assert recipe.as_json() == {
        "method": "dare_ties",
        "adapters": [{"digest": "x", "weight": 1.0}, {"digest": "y", "weight": -0.5}],
        "rank": None,
        "density": 0.5,
        "seed": 3,
    }
    adapters = [(random_adapter(digest, {(0, "q_proj"): 2}), weight) for digest, weight in entries]
    assert merge(adapters, "dare_ties", density=0.5, seed=3).digest == recipe.digest
    others = [
        MergeRecipe.of(entries, "dare_ties", density=0.5, seed=4),
        MergeRecipe.of(entries, "dare_ties", density=0.6, seed=3),
        MergeRecipe.of(entries, "dare_linear", density=0.5, seed=3),
        MergeRecipe.of(entries, "svd", rank=3),
        MergeRecipe.of(entries, "svd", rank=4),
        MergeRecipe.of([("x", 1), ("y", 0.5)], "svd", rank=4),
        MergeRecipe.of([("x", 1), ("z", 0.5)], "svd", rank=4),
    ]
    assert len({recipe.digest, *(other.digest for other in others)}) == 8
    assert MergeRecipe.of(entries, "cat", seed=1).digest == MergeRecipe.of(entries, "cat", seed=2).digest


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"method": "arrow"}, "method is 'arrow'"),
        ({"entries": []}, "at least one"),
        ({"entries": [("a", 0.0)]}, "other than 0"),
        ({"entries": [("a", 1.0), ("b", math.nan)]}, "adapter 'b' is nan"),
        ({"entries": [("a", math.inf)]}, "finite"),
        ({"rank": 4}, "rank is 4 for cat"),
        ({"method": "svd", "rank": 0}, "positive"),
        ({"density": 0.5}, "prunes nothing"),
        ({"method": "ties"}, "density is None"),
        ({"method": "ties", "density": 0.0}, "above 0"),
        ({"method": "dare_linear", "density": 1.5}, "up to 1"),
        ({"method": "dare_ties", "density": math.nan}, "density is nan"),
        ({"method": "dare_ties", "density": 0.5, "seed": -1}, "seed is -1"),
    ],
)
def test_refuses_arguments(changed: dict[str, Any], word: str) -> None:
    arguments = {"entries": [("a", 1.0)], "method": "cat"} | changed
    with pytest.raises(AdapterError, match=word) as caught:
        MergeRecipe.of(**arguments)
    assert (caught.value.code, caught.value.status) == ("invalid_merge", 400)
    field = "adapters" if "entries" in changed else list(changed)[-1]
    if changed.get("entries"):
        field = f"adapters.{len(changed['entries']) - 1}.weight"
    assert caught.value.param == ("density" if changed == {"method": "ties"} else field)


def test_refuses_adapters_that_do_not_fit() -> None:
    module = (1, "q_proj")
    first = random_adapter("a", {module: 2})
    for method in BY_FACTORS:
        with pytest.raises(AdapterError, match=r"q_proj of layer 1 have ranks 2, 3: .* cat or svd") as caught:
            merge([(first, 1.0), (random_adapter("b", {module: 3}), 1.0)], method, density=DENSITY[method])
        assert caught.value.code == "invalid_merge"
    with pytest.raises(AdapterError, match=r"10 x 12 and 10 x 16 features") as caught:
        merge([(first, 1.0), (random_adapter("b", {module: 2}, inputs=16), 1.0)], "cat")
    assert caught.value.code == "adapter_shape_mismatch"
    with pytest.raises(AdapterError, match="no adapter touches") as caught:
        merge([(AdapterWeights("a", {}), 1.0)], "svd")
    assert caught.value.code == "adapter_touches_no_module"
    half = random_adapter("c", {module: 2}, dtype=torch.float16)
    for adapter, weight, method in ((half, 1e12, "linear"), (first, 1e39, "cat"), (half, 1e10, "svd")):
        with pytest.raises(AdapterError, match=r"q_proj of layer 1 overflows float") as caught:
            merge([(adapter, weight)], method)
        assert (caught.value.code, caught.value.status) == ("adapter_not_finite", 422)


def test_svd_never_makes_a_matrix_of_both_feature_sizes() -> None:
    """At 2^21 features on each side the product would take 16 TiB."""
    module, size = (0, "down_proj"), 1 << 21
    one = LoraPair(torch.full((1, size), 0.5), torch.full((size, 1), 0.25), 2.0)
    merged = merge([(AdapterWeights("a", {module: one}), 1.0), (AdapterWeights("b", {module: one}), 3.0)], "svd", 1)
    pair = merged.pairs[module]
    torch.testing.assert_close(pair.b[:5] @ pair.a[:, :5], torch.ones(5, 5))
