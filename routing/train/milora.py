"""Trains MiLoRA routers: before every layer one that decides, from the whole prompt, which experts of the layer act.

MiLoRA (arXiv 2410.18035) makes an expert of each LoRA of one adapter: the adapter and its routers are trained together,
from scratch. Over adapters, which stay frozen, the same routers choose among those. Either way a chosen expert has
weight 1 (over k adapters 1 / k) and not its probability: with all seven linears chosen MiLoRA is to be plain LoRA. The
paper does not say how gradients reach the routers; here by w (1 + p - stopgrad(p)), whose value is the weight.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from routing.card_adapters import CardAdapter
from routing.prompt_folder import MILORA, check_card, write_prompt_router
from routing.prompt_router import MODULES
from routing.train.adapter import TrainError, check_out
from routing.train.batches import Example
from routing.train.data import Task, TaskRow
from routing.train.fitting import fit
from routing.train.language_loss import language_loss
from routing.train.mixed_batches import Mixture
from routing.train.progress import progress_bar
from routing.train.prompt_batches import PromptBatch, collate_prompts
from routing.train.prompt_judge import judge_prompts
from routing.train.prompt_loss import balance_loss, class_loss, task_labels
from routing.train.prompt_model import PromptModel, load_over_adapters, load_over_modules
from routing.train.prompt_recipe import FIXED, MiloraRecipe
from routing.train.prompt_training import coefficients, make_card, make_optimizer
from routing.train.recipe_command import run_command
from routing.train.router_recipe import RouterRun
from routing.train.router_training import CHECKPOINT, PromptResult, encoded, final_losses, fit_settings, training_record
from routing.train.trained_adapters import ADAPTER_NAME, round_experts, write_experts

SPREAD = 0.02
"""Standard deviation of the routers' first matrices: with none all prompts would choose the same experts."""


def train_milora(
    model_folder: Path,
    tasks: Sequence[Task],
    adapters: Mapping[str, Path],
    out: Path,
    recipe: MiloraRecipe | None = None,
    run: RouterRun | None = None,
) -> PromptResult:
    """Trains routers, over modules with the adapter whose linears they choose among, and writes them into `out`.

    The adapter is an ordinary PEFT folder below `out`/adapters, of the router's name, in bf16, as it is judged. It was
    trained with only some of its linears at a time: without its router it is used as it never was before.

    Only training rows are learned from; validation rows give the metrics; test rows are not read. All that is trained
    is fp32, the model's products are as `run` says. A run that was interrupted goes on from its last checkpoint in
    `out`, if the model's architecture, adapters, recipe and rows are the same; on the CPU it ends in the same bits.

    Args:
        adapters: PEFT folders by the names of their tasks; none over modules. Tasks without one train the expert for no
            adapter.

    Raises:
        TrainError: the recipe is impossible, the model, the device or an adapter is missing or does not fit, `out` is
            no folder, or the loss or a weight is no longer finite; a router in `out` stays as it was.
        TaskDataError: a row is longer than the recipe allows.
        RouterFolderError: a name is empty or too long for a router's card.
    """
    recipe, run = recipe or MiloraRecipe(), run or RouterRun()
    started = time.perf_counter()
    run.check()
    check_out(out)
    model = _load(model_folder, tasks, adapters, out, recipe, run)
    own_name = out.resolve().name
    named = replace(model, adapters=(CardAdapter(own_name, "0" * 64),)) if recipe.experts == MODULES else model
    check_card(make_card(MILORA, named, recipe, run, {}))  # rather than after hours
    names = ("loss", "language", "balance", *(("class",) if model.labels else ()))
    kept, dev = _split(tasks, recipe)
    train, apart = (encoded(model, "train", rows, recipe.max_length) for rows in (kept, dev))
    held_out = encoded(model, "valid", [task.valid[: run.evaluation_rows] for task in tasks], recipe.max_length)
    weights, optimizer = model.weights, make_optimizer(model, recipe, recipe.coefficients_rate)
    step_loss = _losses(model, train, recipe, run)
    bilevel = _Bilevel(coefficients(model), optimizer, _losses(model, apart, recipe, run)) if recipe.dev_rows else None

    def losses(step: int) -> Tensor:
        with bilevel.held() if bilevel else contextlib.nullcontext():
            return step_loss(step)

    def after(step: int) -> None:
        if bilevel and (step + 1) % recipe.coefficients_every == 0:
            bilevel.update(step)

    out.mkdir(parents=True, exist_ok=True)
    with progress_bar(run.progress) as report:
        settings = fit_settings(MILORA, model, tasks, recipe, run, out, names)
        found = fit(weights, optimizer, losses, settings, report, after)
        if recipe.experts == MODULES:
            round_experts(model.experts)
        training = training_record(tasks, adapters, recipe, final_losses(names, found))
        if run.evaluation_rows:
            report("held-out rows", None)
            training["metrics"] = judge_prompts(model, [task.name for task in tasks], held_out, run)
    if recipe.experts == MODULES:
        model = replace(
            model, adapters=write_experts(model.experts, model.shape, out, {own_name: tasks}, run.base_name)
        )
    card = write_prompt_router(out, make_card(MILORA, model, recipe, run, training), model.routers.routers)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return PromptResult(out, card, tuple(found), time.perf_counter() - started)


def milora_losses(model: PromptModel, batch: PromptBatch, recipe: MiloraRecipe) -> Tensor:
    """The total, L_LM, the load balance and, over adapters, L_cls; fp32."""
    with model.routers.reading(batch.prompts, decides=True):
        language = language_loss(model.causal, batch.ids, batch.mask, batch.labels)
    logits = model.routers.logits
    balance = balance_loss(logits)
    total = language + recipe.balance * balance
    if not model.labels:
        return torch.stack((total, language, balance))
    of_class = class_loss(logits, task_labels(batch.tasks, model.labels), recipe.smoothing)
    return torch.stack((total + recipe.eta * of_class, language, balance, of_class))


class _Bilevel:
    """Coefficients that learn from other rows than everything else, in steps of their own."""

    def __init__(
        self,
        weights: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        losses: Callable[[int], Tensor],
    ) -> None:
        self._weights = weights
        self._optimizer = optimizer
        self._losses = losses

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While it lasts they get no gradient; the optimiser passes over what has none."""
        for weight in self._weights:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in self._weights:
                weight.requires_grad_(True)

    def update(self, step: int) -> None:
        """One step of theirs, first order: what the others would do after it is not foreseen."""
        gradients = torch.autograd.grad(self._losses(step)[0], self._weights)
        for weight, gradient in zip(self._weights, gradients, strict=True):
            weight.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()


def _load(
    model_folder: Path,
    tasks: Sequence[Task],
    adapters: Mapping[str, Path],
    out: Path,
    recipe: MiloraRecipe,
    run: RouterRun,
) -> PromptModel:
    if recipe.experts == MODULES:
        if adapters:
            raise TrainError(f"adapter {min(adapters)}: expected none, over modules an adapter is trained from scratch")
        if not re.fullmatch(ADAPTER_NAME, out.resolve().name):
            raise TrainError(f"{out}: its name will be the adapter's, expected {ADAPTER_NAME}")
        model = load_over_modules(model_folder, tasks, recipe, run.device, spread=SPREAD)
    else:
        model = load_over_adapters(model_folder, tasks, adapters, recipe, run.device, spread=SPREAD, acting=True)
    if recipe.coefficients == FIXED:
        for weight in coefficients(model):
            weight.requires_grad_(False)
    return model


def _split(tasks: Sequence[Task], recipe: MiloraRecipe) -> tuple[list[Sequence[TaskRow]], list[Sequence[TaskRow]]]:
    """Training rows to learn from, and those set apart for coefficients: a tenth, or the one row that there is."""
    if not recipe.dev_rows:
        return [task.train for task in tasks], []
    counts = [max(1, len(task.train) // 10) for task in tasks]
    pairs = list(zip(tasks, counts, strict=True))
    return [task.train[:-count] or task.train for task, count in pairs], [task.train[-count:] for task, count in pairs]


def _losses(
    model: PromptModel, rows: Sequence[Sequence[Example]], recipe: MiloraRecipe, run: RouterRun
) -> Callable[[int], Tensor]:
    mixture, device = Mixture(rows, recipe.batch_size, recipe.seed), torch.device(run.device)

    def losses(step: int) -> Tensor:
        batch = collate_prompts(mixture.samples(step), model.tokenizer.pad_token_id, device)
        with run.autocast():
            return milora_losses(model, batch, recipe)

    return losses


if __name__ == "__main__":
    sys.exit(run_command(MILORA, sys.argv[1:]))
