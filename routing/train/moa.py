"""Trains a MoA router: one linear map before every layer that tells whose prompt it is, over adapters that are given.

Mixture-of-LoRAs (arXiv 2403.03432) learns L_LM + eta L_cls while each row goes through the adapter of its own domain.
With frozen adapters L_LM has no gradient, so it is not computed: one forward pass of the base model over the prompts is
all that a step needs. Routers read hidden states of the base model in any case, because that is what they see in
serving, where no adapter is chosen yet.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from routing.prompt_folder import MOA, check_card, write_prompt_router
from routing.train.adapter import check_out
from routing.train.data import Task
from routing.train.fitting import fit
from routing.train.language_loss import language_loss
from routing.train.mixed_batches import Mixture
from routing.train.progress import progress_bar
from routing.train.prompt_batches import PromptBatch, collate_prompts
from routing.train.prompt_judge import judge_prompts
from routing.train.prompt_loss import class_loss, task_labels
from routing.train.prompt_model import PromptModel, load_over_adapters
from routing.train.prompt_recipe import MoaRecipe
from routing.train.prompt_training import make_card, make_optimizer
from routing.train.recipe_command import run_command
from routing.train.router_recipe import RouterRun
from routing.train.router_training import CHECKPOINT, PromptResult, encoded, final_losses, fit_settings, training_record
from routing.train.trained_adapters import round_experts, write_experts


def train_moa(
    model_folder: Path,
    tasks: Sequence[Task],
    adapters: Mapping[str, Path],
    out: Path,
    recipe: MoaRecipe | None = None,
    run: RouterRun | None = None,
) -> PromptResult:
    """Trains routers over the adapters of `tasks` and writes them into the folder `out`.

    Only training rows are learned from; validation rows give the metrics; test rows are not read. Routers are fp32, the
    model's products are as `run` says. A run that was interrupted goes on from its last checkpoint in `out`, if the
    model's architecture, adapters, recipe and rows are the same; on the CPU it ends in the same bits. Adapters that are
    trained jointly are written as new ones, below `out`/adapters.

    Args:
        adapters: PEFT folders by the names of their tasks. Tasks without one train the expert for no adapter.

    Raises:
        TrainError: the recipe is impossible, the model, the device or an adapter is missing or does not fit, `out` is
            no folder, or the loss or a weight is no longer finite; a router in `out` stays as it was.
        TaskDataError: a row is longer than the recipe allows.
        RouterFolderError: a name is empty or too long for a router's card.
    """
    recipe, run = recipe or MoaRecipe(), run or RouterRun()
    started = time.perf_counter()
    run.check()
    check_out(out)
    model = load_over_adapters(
        model_folder, tasks, adapters, recipe, run.device, spread=0.0, acting=recipe.joint, trainable=recipe.joint
    )
    check_card(make_card(MOA, model, recipe, run, {}))  # rather than after hours
    names = ("loss", "language", "class") if recipe.joint else ("loss", "class")
    train = encoded(model, "train", [task.train for task in tasks], recipe.max_length)
    held_out = encoded(model, "valid", [task.valid[: run.evaluation_rows] for task in tasks], recipe.max_length)
    mixture = Mixture(train, recipe.batch_size, recipe.seed)
    device = torch.device(run.device)

    def losses(step: int) -> Tensor:
        samples = mixture.samples(step)
        batch = collate_prompts(samples, model.tokenizer.pad_token_id, device, answers=recipe.joint)
        with run.autocast():
            return moa_losses(model, batch, recipe)

    out.mkdir(parents=True, exist_ok=True)
    with progress_bar(run.progress) as report:
        settings = fit_settings(MOA, model, tasks, recipe, run, out, names)
        found = fit(model.weights, make_optimizer(model, recipe), losses, settings, report)
        training = training_record(tasks, adapters, recipe, final_losses(names, found))
        if run.evaluation_rows:
            report("held-out rows", None)
            training["metrics"] = judge_prompts(model, [task.name for task in tasks], held_out, run)
    if recipe.joint:
        round_experts(model.experts)
        own = {task.name: [task] for task in tasks if task.name in adapters}
        model = replace(model, adapters=write_experts(model.experts, model.shape, out, own, run.base_name))
    card = write_prompt_router(out, make_card(MOA, model, recipe, run, training), model.routers.routers)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return PromptResult(out, card, tuple(found), time.perf_counter() - started)


def moa_losses(model: PromptModel, batch: PromptBatch, recipe: MoaRecipe) -> Tensor:
    """eta L_cls and L_cls; with adapters trained jointly L_LM + eta L_cls, L_LM, L_cls. fp32."""
    labels = task_labels(batch.tasks, model.labels)
    with model.routers.reading(batch.prompts, decides=False):
        model.causal.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    of_class = class_loss(model.routers.logits, labels, recipe.smoothing)
    if not recipe.joint:
        return torch.stack((recipe.eta * of_class, of_class))
    own = torch.nn.functional.one_hot(labels, model.routers.form.num_experts).float()
    with model.routers.forced(own):
        language = language_loss(model.causal, batch.ids, batch.mask, batch.labels)
    return torch.stack((language + recipe.eta * of_class, language, of_class))


if __name__ == "__main__":
    sys.exit(run_command(MOA, sys.argv[1:]))
