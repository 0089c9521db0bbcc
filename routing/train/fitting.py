"""The loop of a training run: gradients, clipping, learning rates, checkpoints, and a stop where numbers fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from routing.train.adapter import TrainError
from routing.train.checkpoint import load_checkpoint, save_checkpoint
from routing.train.progress import Report


@dataclass(frozen=True, slots=True)
class Fit:
    """What a loop needs to know. `share(step)` is the part of every group's `peak` learning rate, steps from 0;
    `identity` names recipe and data: a checkpoint is continued only under the same one.
    """

    steps: int
    share: Callable[[int], float]
    gradient_clip: float
    checkpoint: Path
    checkpoint_every: int
    identity: str
    names: tuple[str, ...]
    """What the losses of a step are called, the total first."""


def fit(
    weights: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    losses: Callable[[int], Tensor],
    run: Fit,
    report: Report,
    after: Callable[[int], None] | None = None,
) -> list[tuple[float, ...]]:
    """Runs from the last checkpoint to the end; returns each step's losses, those of this run only.

    Args:
        weights: all that is trained, by names that stay the same.
        optimizer: its parameter groups have `peak`, their highest learning rate.
        losses: of a step, fp32 (names): the total, which is learned from, and its parts.
        after: what else is done in each step, with the rates of this step.

    Raises:
        TrainError: the total or a weight is no longer finite.
    """
    done: list[Tensor] = []
    for step in range(load_checkpoint(run.checkpoint, weights, optimizer, run.identity), run.steps):
        found = losses(step)
        torch.autograd.backward(found[0])
        trained = [weight for weight in weights.values() if weight.grad is not None]
        torch.nn.utils.clip_grad_norm_(trained, run.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * run.share(step)
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after(step)
        done.append(found.detach())
        if (step + 1) % 10 == 0 or step + 1 == run.steps:  # reading the loss waits for the device
            _report(done[-1].tolist(), step, run, report)
        if (step + 1) % run.checkpoint_every == 0 or step + 1 == run.steps:
            if not all(bool(torch.isfinite(weight).all()) for weight in weights.values()):
                raise TrainError(f"the weights are not finite after step {step + 1}; lower the learning rate")
            if step + 1 < run.steps:
                save_checkpoint(run.checkpoint, weights, optimizer, step + 1, run.identity)
    return [tuple(each) for each in torch.stack(done).tolist()]


def warm_linear(step: int, steps: int, warmup: int) -> float:
    """The share of the peak at `step`, from 0: linear up over `warmup` steps, then linear down to zero at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(1, steps - warmup)


def _report(losses: list[float], step: int, run: Fit, report: Report) -> None:
    if not math.isfinite(losses[0]):
        raise TrainError(f"the loss is {losses[0]} at step {step + 1}; lower the learning rate")
    shown = ", ".join(f"{name} {loss:.3f}" for name, loss in zip(run.names, losses, strict=True))
    report(shown, (step + 1, run.steps))
