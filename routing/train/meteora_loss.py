"""The two losses of a token-level router's training, and its metrics on rows held out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from routing.train.batches import IGNORED, Example
from routing.train.language_loss import language_loss
from routing.train.meteora_model import GatedModel
from routing.train.meteora_recipe import ALL, ANSWER
from routing.train.mixed_batches import MixedBatch, collate_mixed
from routing.train.router_recipe import RouterRun


def gate_labels(batch: MixedBatch, labels: Sequence[int], positions: str) -> Tensor:
    """The row that the gates should choose at each position (rows, longest) int64, -100 where they are not counted.

    labels: the row of every task. positions: "all", or those that predict a token of an "answer".
    """
    rows = torch.tensor(labels, device=batch.tasks.device)[batch.tasks.clamp_min(0)]
    counted = batch.answers if positions == ANSWER else batch.tasks != IGNORED
    return rows.masked_fill(~counted, IGNORED)


def both_losses(
    model: GatedModel, batch: MixedBatch, positions: str, *, smoothing: float = 0.0, hits: bool = False
) -> tuple[Tensor, Tensor]:
    """L_LM and L_gate of a batch, fp32 scalars: means over the tokens, and over gates and positions, that count.

    Args:
        positions: as `gate_labels`.
        smoothing: share of a gate's label that is spread over all its rows.
        hits: the tally says where gates are right, too.
    """
    with model.tally.counting(gate_labels(batch, model.labels, positions), smoothing=smoothing, hits=hits):
        language = language_loss(model.causal, batch.ids, batch.mask, batch.labels)
    return language, model.tally.loss


@torch.no_grad()
def judge(model: GatedModel, names: Sequence[str], rows: Sequence[Sequence[Example]], run: RouterRun) -> dict[str, Any]:
    """Metrics of each task's rows, each task by itself, and their means over the tasks.

    `loss` and `gate_loss` are L_LM over answers and L_gate over all positions without label smoothing; `gate_accuracy`
    is the share of (gate, position) whose highest logit is the task's, `gate_accuracy_answer` that of the positions
    that predict a token of the answer. `gate_accuracy_apart` begins with the first token that is not the same in all
    rows: no gate can tell apart the `shared_tokens` of the chat template before it, 36% of the positions of seven tasks
    with SmolLM2-135M.
    """
    shared = _shared_tokens([example.ids for own in rows for example in own])
    found = {
        name: _judge(model, task, own, shared, run) for task, (name, own) in enumerate(zip(names, rows, strict=True))
    }
    keys = next(iter(found.values())).keys()
    means = {key: round(sum(scores[key] for scores in found.values()) / len(found), 4) for key in keys}
    tasks = {name: {key: round(score, 4) for key, score in scores.items()} for name, scores in found.items()}
    return {"split": "valid", "shared_tokens": shared, **means, "tasks": tasks}


def _shared_tokens(rows: Sequence[Sequence[int]]) -> int:
    """With how many tokens all rows begin alike; a row's last token never counts."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return min(sum(1 for _ in same), min(len(row) for row in rows) - 1)


def _judge(model: GatedModel, task: int, rows: Sequence[Example], shared: int, run: RouterRun) -> dict[str, float]:
    device = torch.device(run.device)
    losses, hits, answers, apart = [], [], [], []
    for first in range(0, len(rows), run.evaluation_batch):
        samples = [((task, example),) for example in rows[first : first + run.evaluation_batch]]
        batch = collate_mixed(samples, model.tokenizer.pad_token_id, device)
        with run.autocast():
            means = torch.stack(both_losses(model, batch, ALL, hits=True))
        losses.append(means * torch.stack((batch.answers.sum(), batch.mask.sum())))
        real = batch.mask.bool()
        hits.append(model.tally.hits)
        answers.append(batch.answers[real])
        apart.append((torch.arange(real.shape[1], device=device) >= shared).expand_as(real)[real])
    right, of_answer = torch.cat(hits), torch.cat(answers)
    loss, gate_loss = torch.stack(losses).sum(dim=0).tolist()
    return {
        "loss": loss / int(of_answer.sum()),
        "gate_loss": gate_loss / len(right),
        "gate_accuracy": float(right.mean()),
        "gate_accuracy_answer": float(right[of_answer].mean()),
        "gate_accuracy_apart": float(right[torch.cat(apart)].mean()),
    }
