"""Trains a token-level mixture of LoRA experts from scratch, the baseline that MiLoRA is compared with.

As MiLoRA (arXiv 2410.18035) sets it up: in each of the seven linears, experts of a small rank and a gate that weighs
the best few for every token, all trained together by the language model's loss. The rest of that baseline is not told;
here there is no further loss. What comes out is a MeteoRA router over its experts, and is served as one.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters_store.types import TARGETS, AdapterWeights, LoraPair
from routing.card_adapters import MAX_ADAPTERS, CardAdapter
from routing.gate_folder import check_card, write_gates
from routing.train.adapter import TrainError, check_device, check_out
from routing.train.batches import Example
from routing.train.data import Task
from routing.train.fitting import fit
from routing.train.gate_tally import GateTally
from routing.train.gated_linear import GateChoice, embed_adapters
from routing.train.language_loss import language_loss
from routing.train.meteora_model import GatedModel
from routing.train.mixed_batches import Mixture, collate_mixed
from routing.train.progress import Report, progress_bar
from routing.train.recipe_command import run_command
from routing.train.router_model import load_frozen
from routing.train.router_recipe import RouterRecipe, RouterRun, Rule, at_least_zero, whole
from routing.train.router_training import CHECKPOINT, GateResult, encoded, fit_settings, training_record
from routing.train.task_adapters import check_names, model_config
from routing.train.trained_adapters import (
    ADAPTER_NAME,
    fresh_pair,
    round_experts,
    write_experts,
)

SPREAD = 0.02
"""Standard deviation of the gates at first: with none all tokens would choose the same experts."""


@dataclass(frozen=True, slots=True)
class MoeLoraRecipe(RouterRecipe):
    """Everything that decides the experts and their gates, bar the model and the rows.

    The defaults are a rank of 32 in 8 parts, 4 of which act on a token. `learning_rate` is the peak of experts and
    gates.
    """

    experts: int = 8
    rank: int = 4
    alpha: int = 8
    top_k: int = 4
    learning_rate: float = 2e-3
    steps: int = 400
    warmup_steps: int = 20
    weight_decay: float = 0.0

    def rules(self, experts: int) -> Mapping[str, Rule]:
        return {
            "experts": (2 <= self.experts <= MAX_ADAPTERS, f"2 to {MAX_ADAPTERS}"),
            **RouterRecipe.rules(self, experts),
            "null": (not self.null, "none: every token takes experts"),
            "learning_rate": at_least_zero(self.learning_rate),
            **{name: whole(getattr(self, name), 1) for name in ("rank", "alpha")},
        }


def train_moelora(
    model_folder: Path,
    tasks: Sequence[Task],
    out: Path,
    recipe: MoeLoraRecipe | None = None,
    run: RouterRun | None = None,
) -> GateResult:
    """Trains experts and gates on all tasks; writes a MeteoRA router into `out`, its experts below `out`/adapters.

    Seeds, precision and continuing after an interruption are as in `train_meteora`.

    Raises:
        TrainError: the recipe is impossible, model or device is missing, `out` is no folder or no adapter's name, or
            the loss or a weight is no longer finite.
        TaskDataError: a row is longer than the recipe allows.
        RouterFolderError: a name is empty or too long for a router's card.
    """
    recipe, run = recipe or MoeLoraRecipe(), run or RouterRun()
    started = time.perf_counter()
    check_out(out)
    check_names(tasks)
    run.check()
    recipe.check(recipe.experts)
    check_device(run.device)
    names = [f"{out.resolve().name}-{expert}" for expert in range(recipe.experts)]
    if not re.fullmatch(ADAPTER_NAME, names[-1]):
        raise TrainError(f"{out}: its name begins the experts', expected {ADAPTER_NAME}")
    model = _load(model_folder, recipe, run, names)
    check_card(model.card(recipe, run, {}))  # rather than after hours
    train = encoded(model, "train", [task.train for task in tasks], recipe.max_length)
    held_out = encoded(model, "valid", [task.valid[: run.evaluation_rows] for task in tasks], recipe.max_length)
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar(run.progress) as report:
        losses = _fit(model, tasks, train, recipe, run, out, report)
        round_experts(model.experts)
        last = {"method": "moelora", "final_loss": round(losses[-1][0], 4)}
        training = training_record(tasks, {}, recipe, last)
        if run.evaluation_rows:
            report("held-out rows", None)
            training["metrics"] = _judge(model, tasks, held_out, run)
    written = write_experts(model.experts, model.shape, out, dict.fromkeys(names, tasks), run.base_name)
    gates = {module: linear.gate for module, linear in model.linears.items()}
    card = write_gates(out, replace(model, adapters=written).card(recipe, run, training), gates)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return GateResult(out, card, tuple(losses), time.perf_counter() - started)


def _load(model_folder: Path, recipe: MoeLoraRecipe, run: RouterRun, names: Sequence[str]) -> GatedModel:
    config = model_config(model_folder)
    shape = config.linear_shape
    generator = torch.Generator().manual_seed(recipe.seed)  # on the CPU: the same on every device

    def drawn(target: str) -> LoraPair:
        return fresh_pair(shape.inputs[target], shape.outputs[target], recipe.rank, recipe.alpha, generator)

    modules = [(layer, target) for layer in range(shape.num_layers) for target in TARGETS]
    experts = [AdapterWeights("", {module: drawn(module[1]) for module in modules}) for _ in names]
    causal, tokenizer = load_frozen(model_folder, run.device)
    tally = GateTally()
    linears = embed_adapters(causal, experts, False, GateChoice(recipe.top_k, 1.0), tally, trainable=True)
    for linear in linears.values():
        linear.gate.data.copy_(SPREAD * torch.randn(linear.gate.shape, generator=generator))
    adapters = tuple(CardAdapter(name, "0" * 64) for name in names)
    return GatedModel(causal, tokenizer, shape, config.fingerprint(), adapters, (), linears, tally)


def _fit(
    model: GatedModel,
    tasks: Sequence[Task],
    rows: Sequence[Sequence[Example]],
    recipe: MoeLoraRecipe,
    run: RouterRun,
    out: Path,
    report: Report,
) -> list[tuple[float, ...]]:
    mixture = Mixture(rows, recipe.batch_size, recipe.seed)
    weights = model.weights
    groups = [{"params": list(weights.values()), "peak": recipe.learning_rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)

    def losses(step: int) -> Tensor:
        return _loss(model, mixture.samples(step), run)[None]

    settings = fit_settings("moelora", model, tasks, recipe, run, out, ("loss",))
    return fit(weights, optimizer, losses, settings, report)


def _loss(model: GatedModel, samples: Sequence[Any], run: RouterRun) -> Tensor:
    batch = collate_mixed(samples, model.tokenizer.pad_token_id, torch.device(run.device))
    with run.autocast():
        return language_loss(model.causal, batch.ids, batch.mask, batch.labels)


@torch.no_grad()
def _judge(
    model: GatedModel, tasks: Sequence[Task], rows: Sequence[Sequence[Example]], run: RouterRun
) -> dict[str, Any]:
    """L_LM over the answers' tokens of each task's rows, and its mean over tasks."""
    found: dict[str, float] = {}
    for task, own in zip(tasks, rows, strict=True):
        total = 0.0
        for first in range(0, len(own), run.evaluation_batch):
            part = own[first : first + run.evaluation_batch]
            samples = [((0, example),) for example in part]
            total += float(_loss(model, samples, run)) * sum(example.answer_length for example in part)
        found[task.name] = total / sum(example.answer_length for example in own)
    mean = sum(found.values()) / len(found)
    losses = {name: {"loss": round(loss, 4)} for name, loss in found.items()}
    return {"split": "valid", "loss": round(mean, 4), "tasks": losses}


if __name__ == "__main__":
    sys.exit(run_command("moelora", sys.argv[1:]))
