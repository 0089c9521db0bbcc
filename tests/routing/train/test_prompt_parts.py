"""Parts of the prompt-level routers' training, each against numbers by hand."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters_store.types import LoraPair
from routing.prompt_router import GELU_A, GELU_B, LayerRouter, RouterForm
from routing.train.adapter import TrainError
from routing.train.batches import Example
from routing.train.checkpoint import load_checkpoint, save_checkpoint
from routing.train.fitting import Fit, fit, warm_linear
from routing.train.layer_routers import LayerRouters, embed_experts, fresh_routers, router_weights
from routing.train.prompt_batches import collate_prompts
from routing.train.prompt_judge import decision_metrics
from routing.train.prompt_loss import balance_loss, class_loss, task_labels
from routing.train.side_by_side import SideBySide

FORM = RouterForm("adapters", 2, 3, 1, "mean", "none", "none", "layer")


def test_rows_are_padded_and_prompts_end_where_answers_begin() -> None:
    samples = [((1, Example((5, 6, 7, 8), 2)),), ((0, Example((9, 4, 3), 1)),)]
    whole = collate_prompts(samples, 0, torch.device("cpu"))
    assert whole.ids.tolist() == [[5, 6, 7, 8], [9, 4, 3, 0]]
    assert whole.mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert whole.labels.tolist() == [[-100, -100, 7, 8], [-100, -100, 3, -100]]
    assert whole.prompts.tolist() == [[True, True, False, False]] * 2
    assert whole.tasks.tolist() == [1, 0]
    prompts = collate_prompts([((1, Example((5, 6, 7, 8), 3)),), *samples[1:]], 0, torch.device("cpu"), answers=False)
    assert prompts.ids.tolist() == [[5, 0], [9, 4]]
    assert prompts.mask.tolist() == prompts.prompts.long().tolist() == [[1, 0], [1, 1]]
    assert (prompts.labels == -100).all()


def test_losses_by_hand() -> None:
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(4), 0.0]], [[0.0, 0.0], [0.0, math.log(4)]]])
    labels = task_labels(torch.tensor([1, 0]), (0, 1))
    assert labels.tolist() == [1, 0]
    expected = -(math.log(0.75) + math.log(0.2) + math.log(0.5) + math.log(0.2)) / 4
    assert class_loss(logits, labels).item() == pytest.approx(expected)
    smoothed = 0.9 * expected - 0.1 * (math.log(0.25 * 0.75) + 2 * math.log(0.16) + math.log(0.25)) / 8
    assert class_loss(logits, labels, 0.1).item() == pytest.approx(smoothed)
    # layer 0: experts 1 and (by the tie) 0 are first once each; mean p = (0.375, 0.625): 2 (0.5 0.375 + 0.5 0.625)
    # layer 1: 0 and 1 are first once each; mean p = (0.5, 0.5)
    assert balance_loss(logits).item() == pytest.approx(1.0 + 1.0)
    crowded = torch.tensor([[[2.0, 0.0, 0.0]]] * 5)
    assert balance_loss(crowded).item() == pytest.approx(3 * math.exp(2) / (math.exp(2) + 2))


def test_experts_side_by_side_are_a_weighted_sum_and_come_apart_again() -> None:
    torch.manual_seed(1)
    pairs = {
        0: LoraPair(torch.randn(2, 4), torch.randn(3, 2), 0.5),
        2: LoraPair(torch.randn(1, 4), torch.randn(3, 1), 2.0),
    }
    experts = SideBySide(pairs, 4, torch.zeros(3, 4))
    x, w = torch.randn(5, 6, 4), torch.rand(5, 1, 4)
    expected = sum(
        (w[..., i : i + 1] * pair.scale * (x @ pair.a.T @ pair.b.T) for i, pair in pairs.items()), torch.zeros(5, 6, 3)
    )
    torch.testing.assert_close(experts(x, w), expected)
    assert not any(weight.requires_grad for weight in experts.parameters())
    found = experts.pairs(torch.float32)
    assert found.keys() == pairs.keys()
    for expert, pair in pairs.items():
        assert torch.equal(found[expert].a, pair.a)
        assert torch.equal(found[expert].b, pair.b)
        assert found[expert].scale == pair.scale


def test_fresh_routers_begin_even_and_as_gelu() -> None:
    form = replace(FORM, pooling="attention", activation="rational", num_layers=40)
    routers = fresh_routers(form, 50, "cpu", 0.02, 3)
    every = torch.stack([router.w for router in routers])
    assert every.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(not router.w_sa.any() for router in routers if router.w_sa is not None)
    for router in routers:
        torch.testing.assert_close(router.a, torch.tensor(GELU_A), check_dtype=False)
        torch.testing.assert_close(router.b, torch.tensor(GELU_B), check_dtype=False)
    assert len(router_weights(routers)) == 160
    plain = fresh_routers(FORM, 50, "cpu", 0.0, 3)
    assert [not router.w.any() for router in plain] == [True, True]
    assert router_weights(plain).keys() == {"layers.0.w", "layers.1.w"}


class Blocks(torch.nn.Module):
    """Two layers of one linear each, which add to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        layers = [torch.nn.Module() for _ in range(2)]
        for layer in layers:
            layer.self_attn = torch.nn.Module()
            layer.self_attn.q_proj = torch.nn.Linear(3, 3, bias=False).requires_grad_(False)
            layer.forward = lambda hidden_states, layer=layer: hidden_states + layer.self_attn.q_proj(hidden_states)
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model.layers:  # type: ignore[union-attr]
            x = layer(hidden_states=x)
        return x


def build(weights: list[Tensor]) -> tuple[Blocks, LayerRouters, dict[int, LoraPair]]:
    torch.manual_seed(4)
    blocks = Blocks()
    pairs = {expert: LoraPair(torch.randn(2, 3), torch.randn(3, 2), 1.5) for expert in (0, 1)}
    routers = LayerRouters(FORM, [LayerRouter(torch.nn.Parameter(w)) for w in weights], blocks.model.layers)  # type: ignore[arg-type]
    embed_experts(blocks, {(layer, "q_proj"): pairs for layer in (0, 1)}, 3, routers, trainable=False)
    return blocks, routers, pairs


def test_layers_decide_from_what_the_layers_before_them_made() -> None:
    weights = [torch.randn(3, 3, generator=torch.Generator().manual_seed(place)) for place in (7, 8)]
    blocks, routers, pairs = build(weights)
    x = torch.randn(4, 5, 3)
    prompts = torch.arange(5) < torch.tensor([5, 2, 3, 1])[:, None]
    with routers.reading(prompts, decides=True):
        found = blocks(x)
    chosen = []
    for row in range(4):
        h = x[row]
        for layer in range(2):
            logits = weights[layer] @ h[: int(prompts[row].sum())].mean(0)
            torch.testing.assert_close(routers.logits[row, layer], logits)
            expert = int(logits.argmax())
            chosen.append(expert)
            delta = h @ blocks.model.layers[layer].self_attn.q_proj.base.weight.T  # type: ignore[union-attr, index]
            if expert in pairs:  # the third stands for no adapter
                delta = delta + 1.5 * (h @ pairs[expert].a.T @ pairs[expert].b.T)
            h = h + delta
        torch.testing.assert_close(found[row], h)
    assert set(chosen) == {0, 1, 2}


def test_without_deciding_nothing_acts_and_forced_weights_act_alone() -> None:
    blocks, routers, pairs = build([torch.randn(3, 3), torch.randn(3, 3)])
    x = torch.randn(2, 4, 3)
    plain = blocks(x)
    with routers.reading(torch.ones(2, 4, dtype=torch.bool), decides=False):
        assert torch.equal(blocks(x), plain)
    assert routers.logits.shape == (2, 2, 3)
    seen = routers.logits
    with routers.forced(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])):
        forced = blocks(x)
    assert torch.equal(routers.logits, seen)
    torch.testing.assert_close(forced[1], plain[1])
    base = [layer.self_attn.q_proj.base.weight for layer in blocks.model.layers]  # type: ignore[union-attr]
    h = x[0]
    for weight in base:
        h = h + h @ (weight + 1.5 * pairs[1].b @ pairs[1].a).T
    torch.testing.assert_close(forced[0], h)
    assert torch.equal(blocks(x), plain)


def test_gradients_reach_the_probability_of_what_was_chosen() -> None:
    """d/dw of sum(y) is that of p(chosen) times what the chosen expert adds."""
    blocks, routers, pairs = build([torch.randn(3, 3), torch.zeros(3, 3)])
    x = torch.randn(1, 4, 3)
    with routers.reading(torch.ones(1, 4, dtype=torch.bool), decides=True):
        blocks.model.layers[0](hidden_states=x).sum().backward()  # type: ignore[union-attr, index]
    w = routers.routers[0].w.detach().clone().requires_grad_()
    p = (w @ x[0].mean(0)).softmax(0)
    expert = int(p.argmax())
    added = 1.5 * (x @ pairs[expert].a.T @ pairs[expert].b.T).sum() if expert in pairs else torch.zeros(())
    (gradient,) = torch.autograd.grad(p[expert] * added, w)
    torch.testing.assert_close(routers.routers[0].w.grad, gradient)
    assert gradient.abs().max() > 0


def test_metrics_by_hand() -> None:
    first = torch.tensor([[[9.0, 0, 0], [0, 9.0, 0], [9.0, 0, 0]], [[9.0, 0, 0], [0, 0, 9.0], [0, 0, 9.0]]])
    second = torch.tensor([[[0, 9.0, 0], [0, 9.0, 0], [0, 0, 9.0]]])
    form = replace(FORM, num_layers=3)
    found = decision_metrics([first, second], (0, 1), replace(form, decision="vote"))
    assert found["accuracy"] == 0.75  # the first task's second prompt is voted wrong; tasks count alike
    assert found["accuracy_by_layer"] == [1.0, 0.5, 0.25]
    assert found["accuracy_by_depth"] == [1.0, 1.0, 0.75]  # of one vote each, the first expert's wins
    assert found["usage"] == [0.3333, 0.3333, 0.3333]
    assert found["agreement"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["entropy"] < 0.01
    layered = decision_metrics([first, second], (0, 1), form)
    assert layered["accuracy"] == pytest.approx(((2 / 3 + 1 / 3) / 2 + 2 / 3) / 2, abs=1e-4)
    assert layered["agreement"] == 1.0
    even = decision_metrics([torch.zeros(4, 3, 3)], (), form)
    assert (even["entropy"], even.keys()) == (1.0, {"entropy", "agreement", "usage"})


def settings(tmp_path: Path, **changes: Any) -> Fit:
    return replace(Fit(6, lambda step: warm_linear(step, 6, 2), 1e9, tmp_path / "c", 2, "run", ("loss",)), **changes)


def test_rates_warm_up_and_fall_in_each_group_from_its_own_peak(tmp_path: Path) -> None:
    assert [warm_linear(step, 6, 2) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert warm_linear(0, 1, 0) == 1.0
    weights = {name: torch.nn.Parameter(torch.ones(2)) for name in "ab"}
    optimizer = torch.optim.SGD(
        [{"params": [weights[n]], "peak": peak} for n, peak in (("a", 1.0), ("b", 0.1))], lr=9.0
    )
    moved = []

    def losses(_: int) -> Tensor:
        moved.append([float(weight[0].detach()) for weight in weights.values()])
        return torch.stack([weights["a"].sum() + weights["b"].sum()])

    seen: list[int] = []
    found = fit(weights, optimizer, losses, settings(tmp_path, checkpoint_every=9), lambda *_: None, seen.append)
    steps = [[before - after for before, after in zip(*pair, strict=True)] for pair in itertools.pairwise(moved)]
    assert [step[0] for step in steps] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5])
    assert [step[1] for step in steps] == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.05])
    assert seen == list(range(6))
    assert [loss for (loss,) in found] == pytest.approx([sum(pair) * 2 for pair in moved])


def test_gradients_are_clipped_together(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [weight], "peak": 1.0}], lr=0.0)
    run = settings(tmp_path, steps=1, share=lambda _: 1.0, gradient_clip=0.5)
    fit({"w": weight}, optimizer, lambda _: (weight * torch.tensor([3.0, 4.0])).sum()[None], run, lambda *_: None)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.3, -0.4]), rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_no_number_is_named(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [weight], "peak": 1.0}], lr=0.0)
    with pytest.raises(TrainError, match="the loss is inf at step 6; lower"):
        fit({"w": weight}, optimizer, lambda _: (weight.sum() + torch.inf)[None], settings(tmp_path), lambda *_: None)


def test_weights_that_rest_keep_their_own_count_of_updates(tmp_path: Path) -> None:
    def fresh() -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
        weights = {name: torch.nn.Parameter(torch.ones(2)) for name in ("often", "once", "never")}
        return weights, torch.optim.AdamW(weights.values(), lr=0.1)

    def update(weights: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW, *names: str) -> None:
        for name in names:
            weights[name].grad = torch.tensor([0.3, -2.0])
        optimizer.step()
        optimizer.zero_grad()

    weights, optimizer = fresh()
    update(weights, optimizer, "often", "once")
    update(weights, optimizer, "often")
    save_checkpoint(tmp_path / "c", weights, optimizer, 2, "run")
    others, second = fresh()
    assert load_checkpoint(tmp_path / "c", others, second, "run") == 2
    for every in ((weights, optimizer), (others, second)):
        update(*every, "often", "once", "never")
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert load_checkpoint(tmp_path / "c", *fresh(), "another run") == 0
