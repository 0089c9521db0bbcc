"""MiLoRA's training against a plain loop over single sequences, written from the formulas."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from meteora_world import toy_task, write_adapter
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters_store.linear_names import Module, module_path
from adapters_store.types import TARGETS
from routing.prompt_folder import load_prompt_router
from routing.train.batches import Example, encode
from routing.train.layer_routers import fresh_routers
from routing.train.milora import SPREAD, train_milora
from routing.train.mixed_batches import Mixture, Sample
from routing.train.prompt_model import load_over_modules
from routing.train.prompt_recipe import MiloraRecipe
from routing.train.router_recipe import RouterRun

ADAPTERS = MiloraRecipe(
    experts="adapters",
    top_k=2,
    pooling="attention",
    activation="rational",
    norm="none",
    null=True,
    smoothing=0.2,
    router_rate=0.05,
    steps=4,
    batch_size=3,
    max_length=60,
    warmup_steps=2,
    weight_decay=0.3,
    gradient_clip=0.1,
    seed=5,
    rank=3,
    alpha=5,
    balance=0.4,
    eta=0.7,
    coefficients="dev",
    coefficients_rate=0.03,
    coefficients_every=2,
    adapter_rate=0.02,
)
MODULES = replace(ADAPTERS, experts="modules", null=False, top_k=3, norm="rms", coefficients="train")
TASKS = [toy_task("ab", "ab", rows=24), toy_task("plain", "pq"), toy_task("xyz", "xyz")]
LABELS = (0, 2, 1)
RUN = RouterRun(progress=False, evaluation_rows=0, base_name="tiny")

Factors = dict[Module, dict[int, tuple[Tensor, Tensor, float]]]
"""A, B and scale by linear and expert."""


class PlainModel:
    """The model of `transformers`, with what routers and experts add as hooks; one sequence at a time."""

    def __init__(self, folder: Path, recipe: MiloraRecipe, factors: Factors, experts: int) -> None:
        self.causal: Any = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
        self.recipe = recipe
        self.experts = experts
        fresh = fresh_routers(recipe.form(2, experts), 32, "cpu", SPREAD, recipe.seed)
        self.routers: list[dict[str, Tensor]] = [
            {name: getattr(router, name) for name in ("w", "w_sa", "a", "b")} for router in fresh
        ]
        self.factors = factors
        self.prompt = 0
        self.weights: Tensor | None = None
        self.logits: list[Tensor] = []
        for layer, block in enumerate(self.causal.model.layers):
            block.register_forward_pre_hook(self._decide(self.routers[layer]))
        for module, own in factors.items():
            self.causal.get_submodule(module_path(*module)).register_forward_hook(self._added(own))

    def _decide(self, router: dict[str, Tensor]) -> Callable[..., None]:
        def decide(_: object, inputs: tuple[Tensor, ...]) -> None:
            h = inputs[0][0, : self.prompt]
            if self.recipe.norm == "rms":
                h = h / (h.pow(2).mean(dim=1, keepdim=True) + 1e-6).sqrt()
            shares = torch.exp(h @ router["w_sa"])
            x = (shares / shares.sum()) @ h
            above = sum((router["a"][j] * x**j for j in range(7)), torch.zeros(()))
            below = sum((router["b"][i - 1] * x**i for i in range(1, 6)), torch.zeros(()))
            logits = router["w"] @ (above / (1 + below.abs()))
            p = logits.exp() / logits.exp().sum()
            best = sorted(range(self.experts), key=lambda expert: -p.tolist()[expert])[: self.recipe.top_k]
            even = 1.0 if self.recipe.experts == "modules" else 1 / self.recipe.top_k
            weights = [even * (1 + p[i] - p[i].detach()) if i in best else torch.zeros(()) for i in range(self.experts)]
            self.weights = torch.stack(weights)
            self.logits.append(logits)

        return decide

    def _added(self, own: dict[int, tuple[Tensor, Tensor, float]]) -> Callable[..., Tensor]:
        def added(_: object, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            assert self.weights is not None
            for expert, (a, b, scale) in own.items():
                y = y + self.weights[expert] * scale * (inputs[0] @ a.T @ b.T)
            return y

        return added

    def losses(self, samples: list[Sample]) -> list[Tensor]:
        """The total and its parts."""
        found, every, labels = [], [], []
        for ((task, example),) in samples:
            self.prompt = len(example.ids) - example.answer_length
            self.logits = []
            scores = self.causal(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
            found += [-scores[at - 1, example.ids[at]] for at in range(self.prompt, len(example.ids))]
            every.append(torch.stack(self.logits))
            labels.append(LABELS[task])
        language, logits = torch.stack(found).mean(), torch.stack(every)
        p = logits.softmax(-1)
        balance = torch.zeros(())
        for layer in range(2):
            for expert in range(self.experts):
                share = sum(int(row[layer].argmax()) == expert for row in p) / len(p)
                balance = balance + self.experts * share * p[:, layer, expert].mean()
        total = language + 0.4 * balance
        if self.recipe.experts == "modules":
            return [total, language, balance]
        of_class = [
            -(0.8 * p[row, layer].log()[label] + 0.2 * p[row, layer].log().mean())
            for row, label in enumerate(labels)
            for layer in range(2)
        ]
        class_loss = torch.stack(of_class).mean()
        return [total + 0.7 * class_loss, language, balance, class_loss]


def factors_over_adapters(folder: Path, root: Path) -> tuple[Factors, dict[str, Path]]:
    written = [
        write_adapter(root / "ab", folder, {"q_proj": 2, "down_proj": 5}, seed=1),
        write_adapter(root / "xyz", folder, {"down_proj": 3, "o_proj": 8}, seed=2, layers=1),
    ]
    factors: Factors = {}
    for expert, weights in enumerate(written):
        for module, pair in weights.pairs.items():
            factors.setdefault(module, {})[expert] = (pair.a, pair.b, pair.scale)
    return factors, {name: root / name for name in ("ab", "xyz")}


def factors_over_modules(folder: Path) -> Factors:
    model = load_over_modules(folder, TASKS, MODULES, "cpu", spread=SPREAD)
    factors: Factors = {}
    for module, linear in model.linears.items():
        ((expert, pair),) = linear.experts.pairs(torch.float32).items()
        assert expert == TARGETS.index(module[1])
        assert pair.scale == 5 / 3
        assert not pair.b.any()
        assert 0.9 < pair.a.abs().max() * math.sqrt(pair.a.shape[1]) <= 1  # uniform, in PEFT's bounds
        factors[module] = {expert: (pair.a.requires_grad_(), pair.b.requires_grad_(), pair.scale)}
    return factors


def run_plainly(
    model: PlainModel, recipe: MiloraRecipe, train: list[list[Example]], dev: list[list[Example]]
) -> list[list[float]]:
    """Four steps of AdamW: warmed up in two, then linearly to a half."""
    bilevel = recipe.coefficients == "dev"
    routers = [router[name] for router in model.routers for name in ("w", "w_sa")]
    experts = [factor for own in model.factors.values() for a, b, _ in own.values() for factor in (a, b)]
    experts = [factor for factor in experts if factor.requires_grad]
    curves = [router[name] for router in model.routers for name in ("a", "b")]
    optimizers = [torch.optim.AdamW(routers, weight_decay=0.3), torch.optim.AdamW(curves, weight_decay=0.0)]
    if experts:
        optimizers.append(torch.optim.AdamW(experts, weight_decay=0.3))
    mixtures = [Mixture(rows, 3, 5) for rows in (train, dev)]
    found = []
    for step, share in enumerate((0.5, 1.0, 1.0, 0.5)):
        for optimizer, peak in zip(optimizers, (0.05, 0.03, 0.02), strict=False):
            optimizer.param_groups[0]["lr"] = peak * share
        losses = model.losses(mixtures[0].samples(step))
        learned = [*routers, *experts, *(() if bilevel else curves)]
        gradients = torch.autograd.grad(losses[0], learned)
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
        assert norm > 0.1
        for weight, gradient in zip(learned, gradients, strict=True):
            weight.grad = gradient * 0.1 / norm
        for optimizer in (optimizers[0], *optimizers[2:], *(() if bilevel else optimizers[1:2])):
            optimizer.step()
        if bilevel and step % 2 == 1:
            gradients = torch.autograd.grad(model.losses(mixtures[1].samples(step))[0], curves)
            for weight, gradient in zip(curves, gradients, strict=True):
                weight.grad = gradient
            optimizers[1].step()
        found.append([loss.item() for loss in losses])
    return found


@pytest.mark.parametrize("recipe", [ADAPTERS, MODULES])
def test_routers_end_where_a_plain_loop_ends(chat_model: Path, tmp_path: Path, recipe: MiloraRecipe) -> None:
    kept = {"pooling", "activation", "experts", "null", "top_k", "norm", "coefficients"}  # each differs in one of them
    assert {field.name for field in fields(recipe) if getattr(recipe, field.name) == field.default} <= kept
    over_modules = recipe.experts == "modules"
    factors, adapters = (
        (factors_over_modules(chat_model), {}) if over_modules else factors_over_adapters(chat_model, tmp_path)
    )
    result = train_milora(chat_model, TASKS, adapters, tmp_path / "router", recipe, RUN)
    tokenizer: Any = AutoTokenizer.from_pretrained(chat_model)
    rows = [encode(tokenizer, task.train, 60) for task in TASKS]  # 20, 8 and 8: two, one and one are set apart
    dev = [rows[0][-2:], rows[1][-1:], rows[2][-1:]]
    train = rows if over_modules else [rows[0][:-2], rows[1][:-1], rows[2][:-1]]
    plain = PlainModel(chat_model, recipe, factors, 7 if over_modules else 3)
    losses = run_plainly(plain, recipe, train, dev)
    assert [list(step) for step in result.losses] == [pytest.approx(step, rel=1e-3) for step in losses]
    _, router = load_prompt_router(result.folder)
    for found, wanted in zip(router.layers, plain.routers, strict=True):
        for name, weight in wanted.items():
            torch.testing.assert_close(getattr(found, name), weight.detach(), rtol=2e-3, atol=2e-4)
    if over_modules:
        stored = load_file(tmp_path / "router" / "adapters" / "router" / "adapter_model.safetensors")
        for module, own in plain.factors.items():
            ((a, b, _),) = own.values()
            for factor, weight in (("A", a), ("B", b)):
                found = stored[f"base_model.model.{module_path(*module)}.lora_{factor}.weight"]
                assert found.dtype == torch.bfloat16
                torch.testing.assert_close(found.float(), weight.detach(), rtol=1e-2, atol=3e-4)
