"""Prompt-level routing against its formulas, written out in float64 with loops over tokens."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from routing.prompt_router import (
    GELU_A,
    GELU_B,
    LayerRouter,
    PromptPool,
    PromptRouter,
    RouterForm,
    choose,
    expert_weights,
    pool_rows,
    rational,
    top_experts,
)

POOLINGS = ("attention", "mean", "last", "max")
FORM = RouterForm("adapters", 3, 4, 1, "mean", "none", "none", "vote")


def pooled_by_hand(hidden: Tensor, pooling: str, norm: str, w_sa: Tensor) -> Tensor:
    """(T, d) to (d), token by token."""
    tokens = [token.double() for token in hidden]
    if norm == "rms":
        tokens = [token / math.sqrt(float((token**2).mean()) + 1e-6) for token in tokens]
    if pooling == "last":
        return tokens[-1]
    if pooling == "max":
        return torch.stack([max((token[i] for token in tokens), key=float) for i in range(hidden.shape[1])])
    shares = [1.0 for _ in tokens]
    if pooling == "attention":
        shares = [math.exp(float(token @ w_sa.double())) for token in tokens]
    return sum((share * token for share, token in zip(shares, tokens, strict=True)), torch.zeros(())) / sum(shares)


@pytest.mark.parametrize("norm", ["rms", "none"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_is_the_formula_by_rows_and_by_chunks(pooling: str, norm: str) -> None:
    torch.manual_seed(1)
    hidden, w_sa = 3 * torch.randn(3, 9, 5), torch.randn(5)
    spans = ((0, 9), (4, 9), (2, 6))  # whole, padded on the left, and followed by an answer and padding
    mask = torch.zeros(3, 9, dtype=torch.bool)
    for row, (start, stop) in enumerate(spans):
        mask[row, start:stop] = True
    found = pool_rows(hidden, mask, pooling, norm, w_sa)
    for row, (start, stop) in enumerate(spans):
        own = hidden[row, start:stop]
        wanted = pooled_by_hand(own, pooling, norm, w_sa).float()
        torch.testing.assert_close(found[row], wanted, rtol=1e-5, atol=1e-5)
        for sizes in ([len(own)], [1] * len(own), [1, 2, len(own) - 3]):
            pool = PromptPool(pooling, norm, w_sa)
            for chunk in own.split(sizes):
                pool.update(chunk)
            torch.testing.assert_close(pool.finish(), wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(POOLINGS), st.sets(st.integers(1, 11)), st.integers(0, 100), st.sampled_from([1.0, 50.0]))
def test_chunks_do_not_change_what_is_pooled(pooling: str, cuts: set[int], seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = size * torch.randn(12, 4, generator=generator)  # large ones: scores of hundreds, whose exp overflows
    whole, parts = (PromptPool(pooling, "none", torch.tensor([5.0, -3.0, 2.0, 1.0])) for _ in range(2))
    whole.update(hidden)
    for start, stop in pairwise((0, *sorted(cuts), 12)):
        parts.update(hidden[start:stop])
    torch.testing.assert_close(parts.finish(), whole.finish(), rtol=1e-4, atol=1e-4)
    assert torch.isfinite(parts.finish()).all()


def test_hidden_states_of_half_precision_are_pooled_in_fp32() -> None:
    hidden = torch.full((5000, 1), 1.01, dtype=torch.bfloat16)  # a sum in bf16 would stop at 256
    pool = PromptPool("mean", "none")
    for chunk in hidden.split(1000):
        pool.update(chunk)
    assert pool.finish().dtype == torch.float32
    assert pool.finish().item() == pytest.approx(hidden[0].item(), rel=1e-5)
    mask = torch.ones(1, 5000, dtype=torch.bool)
    assert pool_rows(hidden[None], mask, "mean", "none").item() == pytest.approx(hidden[0].item(), rel=1e-5)


def test_a_prompt_of_one_token_is_that_token_and_none_is_refused() -> None:
    token, w_sa = torch.randn(1, 4), torch.randn(4)
    for pooling in POOLINGS:
        pool = PromptPool(pooling, "none", w_sa)
        with pytest.raises(ValueError, match="a prompt without tokens"):
            pool.finish()
        pool.update(token)
        torch.testing.assert_close(pool.finish(), token[0])


def test_the_last_token_is_kept_though_its_memory_is_used_again() -> None:
    hidden = torch.randn(3, 4)
    pool, wanted = PromptPool("last", "none"), hidden[-1].clone()
    pool.update(hidden)
    hidden.zero_()
    assert torch.equal(pool.finish(), wanted)


def test_the_rational_is_its_formula_and_begins_as_gelu() -> None:
    torch.manual_seed(2)
    x, a, b = torch.randn(50, dtype=torch.float64), torch.randn(7).double(), torch.randn(5).double()
    above = sum(a[j] * x**j for j in range(7))
    below = 1 + abs(sum(b[i - 1] * x**i for i in range(1, 6)))
    torch.testing.assert_close(rational(x, a, b), above / below)
    grid = torch.linspace(-3, 3, 601)
    found = rational(grid, torch.tensor(GELU_A), torch.tensor(GELU_B))
    assert (found - torch.nn.functional.gelu(grid)).abs().max() < 1.3e-4
    wide = torch.linspace(-10, 10, 601)
    found = rational(wide, torch.tensor(GELU_A), torch.tensor(GELU_B))
    assert (found - torch.nn.functional.gelu(wide)).abs().max() < 2.0 + 1e-2
    assert torch.isfinite(rational(torch.tensor([-3e5, 3e5]), torch.tensor(GELU_A), torch.tensor(GELU_B))).all()


def test_logits_are_activation_then_matrix() -> None:
    torch.manual_seed(3)
    h, w, a, b = torch.randn(2, 5), torch.randn(3, 5), torch.randn(7), torch.randn(5)
    torch.testing.assert_close(LayerRouter(w).logits(h), h @ w.T)
    torch.testing.assert_close(LayerRouter(w, a=a, b=b).logits(h), rational(h, a, b) @ w.T)


def test_a_router_gives_pools_of_its_layers() -> None:
    layers = tuple(LayerRouter(torch.ones(4, 2), torch.tensor([weight, 0.0])) for weight in (0.0, 50.0))
    router = PromptRouter(replace(FORM, num_layers=2, pooling="attention"), layers).to(torch.device("cpu"))
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    pools = [router.pool(layer) for layer in (0, 1)]
    for pool in pools:
        pool.update(hidden)
    torch.testing.assert_close(pools[0].finish(), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(pools[1].finish(), torch.tensor([1.0, 0.0]))


LOGITS = torch.tensor([[3.0, 0.0, 1.0, 0.0], [0.0, 2.0, 1.9, 0.0], [0.0, 2.0, 0.0, 1.0]])
"""Three layers of four experts: the first prefers expert 0, the others 1."""


def picked(chosen: Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in chosen]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"decision": "layer"}, [[0], [1], [1]]),
        ({"decision": "layer", "top_k": 2}, [[0, 2], [1, 2], [1, 3]]),
        ({"decision": "vote"}, [[1]] * 3),
        ({"decision": "vote", "top_k": 2}, [[1, 2]] * 3),
        ({"decision": "last"}, [[1]] * 3),
        ({"decision": "last", "depth": 1}, [[0]] * 3),
        ({"decision": "vote", "depth": 1}, [[0]] * 3),
        ({"decision": "vote", "depth": 2}, [[0]] * 3),  # one vote each: 0.79 / 2 is more than 0.44 / 2
    ],
)
def test_decisions_by_hand(changes: dict[str, object], expected: list[list[int]]) -> None:
    form = replace(FORM, **changes)  # type: ignore[arg-type]
    choice = choose(LOGITS, form)
    assert picked(choice.chosen) == expected
    counted = form.num_counted
    torch.testing.assert_close(choice.probabilities, LOGITS[:counted].exp() / LOGITS[:counted].exp().sum(1, True))
    batch = choose(torch.stack((LOGITS, LOGITS.flip(1))), form)
    assert picked(batch.chosen[0]) == expected
    assert torch.equal(batch.chosen[0], choice.chosen)
    assert picked(batch.chosen[1]) == [sorted(3 - expert for expert in experts) for experts in expected]


def test_agreement_is_the_share_of_votes_for_what_was_chosen() -> None:
    assert choose(LOGITS, FORM).agreement.item() == pytest.approx(2 / 3)
    assert choose(LOGITS, replace(FORM, decision="last", depth=1)).agreement.item() == 1.0
    assert choose(LOGITS, replace(FORM, decision="layer", top_k=2)).agreement.item() == 1.0


def test_what_is_not_allowed_takes_no_probability_and_no_vote() -> None:
    allowed = torch.tensor([True, False, True, True])
    choice = choose(LOGITS, FORM, allowed)
    assert picked(choice.chosen) == [[0]] * 3  # 0, 2 and 3 have a vote each, and mean probabilities of 39, 37 and 24%
    kept = LOGITS[:, allowed].exp()
    torch.testing.assert_close(choice.probabilities[:, allowed], kept / kept.sum(dim=1, keepdim=True))
    assert (choice.probabilities[:, 1] == 0).all()
    every = choose(torch.stack((LOGITS, LOGITS)), FORM, torch.stack((allowed, ~allowed)).unsqueeze(1))
    assert picked(every.chosen[:, 0]) == [[0], [1]]


def test_fewer_are_chosen_where_fewer_are_allowed() -> None:
    allowed = torch.tensor([False, False, True, False])
    for decision in ("layer", "vote", "last"):
        choice = choose(LOGITS, replace(FORM, decision=decision, top_k=3), allowed)
        assert picked(choice.chosen) == [[2]] * 3


def test_ties_go_to_the_expert_that_comes_first() -> None:
    _, chosen = top_experts(torch.zeros(2, 40), 3)
    assert picked(chosen) == [[0, 1, 2]] * 2
    assert picked(choose(torch.zeros(3, 4), FORM).chosen) == [[0]] * 3


def test_weights_are_one_for_modules_and_even_shares_for_adapters() -> None:
    chosen = torch.tensor([[True, False, True, False], [False, True, False, False]])
    assert expert_weights(chosen, "modules").tolist() == [[1, 0, 1, 0], [0, 1, 0, 0]]
    assert expert_weights(chosen, "adapters").tolist() == [[0.5, 0, 0.5, 0], [0, 1, 0, 0]]


def test_too_few_routers_are_refused() -> None:
    with pytest.raises(ValueError, match="logits of 2 routers, expected 3"):
        choose(LOGITS[:2], FORM)
    assert picked(choose(LOGITS[:2], replace(FORM, depth=2)).chosen) == [[0]] * 3


def test_only_routers_by_layer_read_what_others_changed() -> None:
    assert [replace(FORM, decision=decision).layered for decision in ("layer", "vote", "last")] == [True, False, False]
