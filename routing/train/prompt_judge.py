"""What prompt-level routers do on rows held out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from routing.prompt_router import VOTE, RouterForm, choose
from routing.train.batches import Example
from routing.train.language_loss import language_loss
from routing.train.prompt_batches import collate_prompts
from routing.train.prompt_loss import class_loss
from routing.train.prompt_model import PromptModel
from routing.train.router_recipe import RouterRun


@torch.no_grad()
def judge_prompts(
    model: PromptModel, names: Sequence[str], rows: Sequence[Sequence[Example]], run: RouterRun
) -> dict[str, Any]:
    """Metrics over the rows of all tasks, every task counting alike; see `decision_metrics`.

    Where every layer decides for itself also `loss`, L_LM over answers with the experts so chosen.
    """
    logits, losses = [], []
    for task, own in enumerate(rows):
        found, loss = _read(model, task, own, run)
        logits.append(found)
        losses.append(loss)
    metrics: dict[str, Any] = {"split": "valid", **decision_metrics(logits, model.labels, model.routers.form)}
    tasks: dict[str, dict[str, float]] = {name: {} for name in names}
    if model.routers.form.layered:
        metrics["loss"] = round(sum(losses) / len(losses), 4)
        for name, loss in zip(names, losses, strict=True):
            tasks[name]["loss"] = round(loss, 4)
    if model.labels:
        for name, scores, label in zip(names, logits, model.labels, strict=True):
            tasks[name]["accuracy"] = round(_accuracy(scores, label, model.routers.form), 4)
    return {**metrics, "tasks": tasks}


def decision_metrics(logits: Sequence[Tensor], labels: Sequence[int], form: RouterForm) -> dict[str, Any]:
    """Of logits (rows, L, N) of each task, and the tasks' experts if they have any.

    `entropy`: mean over routers of the probabilities' entropy over its maximum. `usage`: how often each expert is
    chosen, over prompts and layers. `agreement` as `Choice` has it. With labels: `accuracy`, the share of prompts (and
    layers, where each decides for itself) whose choice has the task's expert; `accuracy_by_layer`, the same of each
    router's first preference; `accuracy_by_depth`, of the vote among the routers of the first layers.
    """
    rows = torch.cat(list(logits))
    choice = choose(rows, form)
    entropy = -(choice.probabilities * choice.probabilities.clamp(min=1e-30).log()).sum(-1) / math.log(rows.shape[-1])
    metrics: dict[str, Any] = {
        "entropy": round(float(entropy.mean()), 4),
        "agreement": round(float(choice.agreement.mean()), 4),
        "usage": _rounded(choice.chosen.float().mean(dim=(0, 1))),
    }
    if not labels:
        return metrics
    targets = torch.cat([torch.full((len(own),), label) for own, label in zip(logits, labels, strict=True)])
    pairs = list(zip(logits, labels, strict=True))
    metrics["class_loss"] = round(float(class_loss(rows, targets.to(rows.device))), 4)
    metrics["accuracy"] = round(_mean([_accuracy(own, label, form) for own, label in pairs]), 4)
    each = [(own.argmax(dim=-1) == label).float().mean(dim=0) for own, label in pairs]
    metrics["accuracy_by_layer"] = _rounded(torch.stack(each).mean(dim=0))
    one = replace(form, decision=VOTE, top_k=1)
    depths = [replace(one, depth=depth) for depth in range(1, form.num_layers + 1)]
    metrics["accuracy_by_depth"] = [
        round(_mean([_accuracy(own, label, vote) for own, label in pairs]), 4) for vote in depths
    ]
    return metrics


def _accuracy(logits: Tensor, label: int, form: RouterForm) -> float:
    return float(choose(logits, form).chosen[..., label].float().mean())


def _read(model: PromptModel, task: int, rows: Sequence[Example], run: RouterRun) -> tuple[Tensor, float]:
    """Logits (rows, L, N) on the CPU, and L_LM over the answers' tokens if layers decide for themselves, else 0."""
    decides, batch_size = model.routers.form.layered, run.evaluation_batch
    logits, total, tokens = [], 0.0, 0
    for first in range(0, len(rows), batch_size):
        samples = [((task, example),) for example in rows[first : first + batch_size]]
        batch = collate_prompts(samples, model.tokenizer.pad_token_id, torch.device(run.device), answers=decides)
        with run.autocast(), model.routers.reading(batch.prompts, decides=decides):
            if decides:
                count = sum(example.answer_length for example in rows[first : first + batch_size])
                total += count * float(language_loss(model.causal, batch.ids, batch.mask, batch.labels))
                tokens += count
            else:
                model.causal.base_model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        logits.append(model.routers.logits.cpu())
    return torch.cat(logits), total / max(1, tokens)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
