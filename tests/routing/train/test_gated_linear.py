"""The gated forward pass against a plain loop over tokens, written from the formulas."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters_store.types import AdapterWeights, LoraPair
from routing.train.gate_tally import GateTally
from routing.train.gated_linear import GateChoice, GatedLinear, embed_adapters, gate_weights

WIDTH, OUT, RANKS = 7, 5, {0: 3, 2: 1, 3: 8}
"""Adapter 1 does not act on this linear."""


def linear(top_k: int, temperature: float, null: bool) -> tuple[GatedLinear, dict[int, LoraPair]]:
    base = torch.nn.Linear(WIDTH, OUT).requires_grad_(False)
    pairs = {row: LoraPair(torch.randn(rank, WIDTH), torch.randn(OUT, rank), 0.5 + row) for row, rank in RANKS.items()}
    gated = GatedLinear(base, pairs, 4 + null, GateChoice(top_k, temperature), GateTally())
    torch.nn.init.normal_(gated.gate)
    return gated, pairs


def plain(gated: GatedLinear, pairs: dict[int, LoraPair], x: Tensor, top_k: int, temperature: float) -> Tensor:
    """y = W x + sum_i w_i s_i B_i A_i x for one token."""
    y = gated.base.weight @ x + gated.base.bias
    logits = (gated.gate.detach() @ x).tolist()
    chosen = sorted(range(len(logits)), key=lambda row: -logits[row])[:top_k]
    shares = [math.exp(logits[row] / temperature) for row in chosen]
    for row, share in zip(chosen, shares, strict=True):
        if row in pairs:
            y = y + share / sum(shares) * pairs[row].scale * (pairs[row].b @ (pairs[row].a @ x))
    return y


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_forward_equals_a_plain_loop(top_k: int, temperature: float, null: bool) -> None:
    gated, pairs = linear(top_k, temperature, null)
    x = torch.randn(3, 20, WIDTH)
    expected = torch.stack([plain(gated, pairs, token, top_k, temperature) for token in x.flatten(0, 1)])
    torch.testing.assert_close(gated(x), expected.view(3, 20, OUT), atol=1e-4, rtol=1e-4)
    if null and top_k == 1:  # where "no adapter" is chosen alone, the base answers
        chosen = (x @ gated.gate.T).argmax(-1) == 4
        assert chosen.any()
        torch.testing.assert_close(gated(x)[chosen], gated.base(x)[chosen])


def test_a_gate_in_a_basis_acts_as_its_product_with_it() -> None:
    torch.manual_seed(0)
    gated, pairs = linear(2, 1.0, null=True)
    basis = torch.randn(WIDTH, WIDTH)
    other = GatedLinear(gated.base, pairs, 5, gated.choice, GateTally(), basis=basis)
    torch.nn.init.normal_(other.gate)
    gated.gate.data.copy_(other.gate.data @ basis)
    x = torch.randn(3, 20, WIDTH)
    torch.testing.assert_close(other.rows, gated.rows)
    torch.testing.assert_close(other(x), gated(x), atol=1e-4, rtol=1e-4)
    assert set(dict(other.named_parameters())) - set(dict(gated.named_parameters())) == set(), "it is not learned"
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(other.rows, gated.rows)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_weights_are_those_of_a_softmax_over_all_rows_renormalised(top_k: int) -> None:
    logits = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(50, 6, dtype=torch.float64)
    shares = logits.softmax(-1)
    kept = shares * (shares >= shares.sort(-1, descending=True).values[:, top_k - 1 : top_k])
    expected = kept / kept.sum(-1, keepdim=True)
    found = gate_weights(logits, GateChoice(top_k, 1.0))
    torch.testing.assert_close(found, expected)
    assert bool(((found > 0).sum(-1) == top_k).all())
    torch.testing.assert_close(
        torch.autograd.grad(found, logits, upstream)[0], torch.autograd.grad(expected, logits, upstream)[0]
    )


def test_a_linear_without_adapters_is_the_base_and_has_a_gate() -> None:
    tally = GateTally()
    base = torch.nn.Linear(WIDTH, OUT)
    gated = GatedLinear(base, {}, 3, GateChoice(2, 1.0), tally)
    x = torch.randn(2, 4, WIDTH)
    with tally.counting(torch.zeros(2, 4, dtype=torch.int64)):
        assert torch.equal(gated(x), base(x))
    assert float(tally.loss.detach()) == pytest.approx(math.log(3))


def test_every_layer_has_the_same_gates_and_only_they_learn(chat_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    causal = AutoModelForCausalLM.from_pretrained(chat_model)
    one = AdapterWeights("", {(0, "q_proj"): LoraPair(torch.ones(2, 32), torch.ones(32, 2), 1.0)})
    two = AdapterWeights("", {(1, "down_proj"): LoraPair(torch.ones(4, 64), torch.ones(32, 4), 3.0)})
    linears = embed_adapters(causal, [one, two], False, GateChoice(2, 1.0), GateTally())
    assert list(linears) == [(0, "q_proj"), (0, "down_proj"), (1, "q_proj"), (1, "down_proj")]
    assert [tuple(linear.gate.shape) for linear in linears.values()] == [(2, 32), (2, 64)] * 2
    assert [len(linear.experts.a) for linear in linears.values()] == [2, 0, 0, 4]
    assert linears[1, "down_proj"].experts.owners.tolist() == [[0.0] * 4, [3.0] * 4]
    learning = {name for name, weight in causal.named_parameters() if weight.requires_grad}
    assert learning == {name for name, _ in causal.named_parameters() if name.endswith(".gate")}
    assert len(learning) == 4


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_tally_is_a_mean_over_gates_and_counted_positions(smoothing: float) -> None:
    tally = GateTally()
    labels = torch.tensor([[0, 2, -100], [1, -100, 2]])
    gates = [torch.randn(2, 3, 3) for _ in range(4)]
    tally.add(gates[0])  # before a pass begins
    with tally.counting(labels, smoothing=smoothing, hits=True):
        for logits in gates:
            tally.add(logits)
    tally.add(gates[0])  # after it
    losses, right = [], []
    for row, place in ((0, 0), (0, 1), (1, 0), (1, 2)):
        label = int(labels[row, place])
        for logits in gates:
            shares = [math.exp(float(value)) for value in logits[row, place]]
            log_shares = [math.log(share / sum(shares)) for share in shares]
            losses.append(-(1 - smoothing) * log_shares[label] - smoothing * sum(log_shares) / 3)
        right.append(sum(int(logits[row, place].argmax()) == label for logits in gates) / 4)
    assert float(tally.loss) == pytest.approx(sum(losses) / 16, rel=1e-5)
    assert tally.hits.tolist() == right


def test_labels_of_which_none_counts_are_refused() -> None:
    tally = GateTally()
    nothing = tally.counting(torch.full((2, 3), -100))
    with pytest.raises(ValueError, match="expected a position that counts, all 6 are -100"), nothing:
        pass
    with pytest.raises(KeyboardInterrupt), tally.counting(torch.zeros(1, 2, dtype=torch.int64)):
        raise KeyboardInterrupt
    tally.add(torch.zeros(3, 4, 2))  # of another size: an interrupted pass is not counted on
