"""Trains a token-level router: gates in every adapted linear of a model, whose adapters stay or are trained with them.

The loss is L_LM + beta L_gate, the language model's own and the gates' mean cross-entropy against the task of the
sample (MeteoRA, section 3.3), on batches of all tasks, in a plain loop.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from routing.gate_folder import check_card, write_gates
from routing.train.adapter import check_out
from routing.train.batches import Example
from routing.train.data import Task
from routing.train.fitting import fit
from routing.train.meteora_loss import both_losses, judge
from routing.train.meteora_model import GatedModel, load_gated_model
from routing.train.meteora_recipe import MeteoraRecipe
from routing.train.mixed_batches import Mixture, collate_mixed
from routing.train.progress import Report, progress_bar
from routing.train.recipe_command import run_command
from routing.train.rewording import Versions, vocabulary
from routing.train.router_recipe import RouterRun
from routing.train.router_training import CHECKPOINT, GateResult, encoded, fit_settings, training_record
from routing.train.trained_adapters import factor_weights, round_experts, write_experts


def train_meteora(
    model_folder: Path,
    tasks: Sequence[Task],
    adapters: Mapping[str, Path],
    out: Path,
    recipe: MeteoraRecipe | None = None,
    run: RouterRun | None = None,
) -> GateResult:
    """Trains gates over the adapters of `tasks` and writes the router into the folder `out`.

    Only training rows are learned from; validation rows give the metrics; test rows are not read. Gates are fp32, the
    model's products are as `run` says. A run that was interrupted goes on from its last checkpoint in `out`, if the
    model's architecture, adapters, recipe and rows are the same; on the CPU it ends in the same bits. Adapters that are
    trained jointly are written as new ones, in bf16, below `out`/adapters.

    Args:
        adapters: PEFT folders by the names of their tasks. Tasks without one train the row for no adapter.

    Raises:
        TrainError: the recipe is impossible, the model, the device or an adapter is missing or does not fit, `out` is
            no folder, or the loss or the gates are no longer finite; a router in `out` stays as it was.
        TaskDataError: a row is longer than the recipe allows.
        RouterFolderError: a name is empty or too long for a router's card.
    """
    recipe, run = recipe or MeteoraRecipe(), run or RouterRun()
    started = time.perf_counter()
    run.check()
    check_out(out)
    model = load_gated_model(model_folder, tasks, adapters, recipe, run.device)
    check_card(model.card(recipe, run, {}, recipe.temperature))  # rather than after hours
    train = _examples(model, tasks, recipe)
    held_out = encoded(model, "valid", [task.valid[: run.evaluation_rows] for task in tasks], recipe.max_length)
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar(run.progress) as report:
        losses = _fit(model, tasks, train, recipe, run, out, report)
        last = {"final_loss": round(losses[-1][0], 4), "final_gate_loss": round(losses[-1][1], 4)}
        training = training_record(tasks, adapters, recipe, last)
        if recipe.joint:
            round_experts(model.experts)
        if run.evaluation_rows:
            report("held-out rows", None)
            names = [task.name for task in tasks]
            training["metrics"] = judge(model, names, held_out, run)
    if recipe.joint:
        own = {task.name: [task] for task in tasks if task.name in adapters}
        model = replace(model, adapters=write_experts(model.experts, model.shape, out, own, run.base_name))
    gates = {module: linear.rows.detach() for module, linear in model.linears.items()}
    card = write_gates(out, model.card(recipe, run, training, recipe.temperature), gates)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return GateResult(out, card, tuple(losses), time.perf_counter() - started)


def _examples(model: GatedModel, tasks: Sequence[Task], recipe: MeteoraRecipe) -> Sequence[Sequence[Example]]:
    """Each task's training rows, or their versions."""
    rows = [task.train for task in tasks]
    found = encoded(model, "train", rows, recipe.max_length)
    if not recipe.reworded:
        return found
    words, how = vocabulary(model.tokenizer), (recipe.reworded, recipe.max_length, recipe.seed)
    return [Versions(model.tokenizer, own, examples, words, *how) for own, examples in zip(rows, found, strict=True)]


def _fit(
    model: GatedModel,
    tasks: Sequence[Task],
    examples: Sequence[Sequence[Example]],
    recipe: MeteoraRecipe,
    run: RouterRun,
    out: Path,
    report: Report,
) -> list[tuple[float, float]]:
    weights, device = model.weights, torch.device(run.device)
    gates = list(model.gates.values())
    groups = [{"params": gates, "peak": recipe.learning_rate}]
    if recipe.joint:
        factors = [weight for weight in factor_weights(model.experts).values() if weight.requires_grad]
        groups.append({"params": factors, "peak": recipe.adapter_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
    mixture = Mixture(examples, recipe.batch_size, recipe.seed, recipe.packed, recipe.max_length)

    def losses(step: int) -> torch.Tensor:
        samples = mixture.samples(step)
        batch = collate_mixed(samples, model.tokenizer.pad_token_id, device, prompts_count=recipe.prompts_count)
        with run.autocast():
            language, gate = both_losses(model, batch, recipe.gate_positions, smoothing=recipe.smoothing)
        return torch.stack((language + recipe.beta * gate, language, gate))

    names = ("loss", "of the answers", "of the gates")
    settings = fit_settings("meteora", model, tasks, recipe, run, out, names)
    return [(language, gate) for _, language, gate in fit(weights, optimizer, losses, settings, report)]


if __name__ == "__main__":
    sys.exit(run_command("meteora", sys.argv[1:]))
