"""Trains the adapters of several tasks at the same time: one frozen model, one pass for the rows of all tasks."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from routing.train.adapter import (
    AdapterRecipe,
    AdapterResult,
    AdapterRun,
    TrainError,
    load_model,
    make_card,
    write_adapter,
)
from routing.train.batches import Example, batch_rows
from routing.train.data import Task
from routing.train.exact_match import answer_limit, grouped_answers
from routing.train.fused_norm import fuse_norms
from routing.train.grouped_lora import GroupedLora, LoraStart, lora_starts
from routing.train.grouped_loss import grouped_batch, losses_and_gradients
from routing.train.grouped_optimizer import GroupedAdamW, clip_rows

SAID_EVERY = 20
"""Steps between two lines of progress."""


class TimeUp(TrainError):
    """The deadline passed before the group was done; nothing of it was written."""


@dataclass(frozen=True, slots=True)
class Member:
    """One task of a group: its rows, its encoded training rows, its recipe and the folder of its adapter."""

    task: Task
    examples: Sequence[Example] = field(repr=False)
    recipe: AdapterRecipe
    folder: Path


@dataclass(frozen=True, slots=True)
class GroupedBase:
    """A loaded model on its device whose adapted linears take any number of tasks, one group after the other."""

    causal: Any
    tokenizer: Any
    starts: tuple[LoraStart, ...]
    config: Any


def load_base(model_folder: Path, recipe: AdapterRecipe, device: str) -> GroupedBase:
    """Loads the model once for all groups; factors start as `train_adapter`'s do.

    Raises:
        TrainError: as `load_model`.
    """
    model, tokenizer = load_model(model_folder, recipe, device)
    fuse_norms(model.get_base_model())
    return GroupedBase(model.get_base_model(), tokenizer, lora_starts(model), model.peft_config["default"])


def train_group(
    base: GroupedBase,
    members: Sequence[Member],
    run: AdapterRun,
    say: Callable[[str], None] = lambda _: None,
    deadline: float = math.inf,
) -> dict[str, AdapterResult | TrainError]:
    """Trains every member's adapter, as `train_adapter` would alone, and writes each into its folder.

    The loss is the sum of the members' losses, which share no weight: each gets its own gradient, clipped by its own
    norm, on its own rows, at its own learning rate, and leaves the batch after its own last step. A member whose loss
    is no longer finite gets an error in place of a result and disturbs no other. A folder appears complete or not at
    all; `seconds` of a result is the group's time over its members. `deadline` is on the clock of `time.monotonic`.

    Raises:
        TimeUp: the deadline passed.
        ValueError: the recipes differ in more than steps, warm-up and learning rate.
    """
    if len({replace(member.recipe, steps=0, warmup_steps=0, learning_rate=0.0) for member in members}) != 1:
        raise ValueError("recipes of a group: expected no differences but in steps, warmup_steps and learning_rate")
    started = time.perf_counter()
    members = sorted(members, key=lambda member: -member.recipe.steps)  # those at work are always the first ones
    lora = GroupedLora(base.causal, base.starts, len(members))
    tests = [member.task.test[: run.evaluation_rows] for member in members]
    limits = [answer_limit(base.tokenizer, rows) for rows in tests]
    say(f"{len(members)} tasks: answers of the base")
    before = grouped_answers(base.causal, base.tokenizer, tests, limits, run.evaluation_batch)
    losses = _fit(base, lora, members, say, deadline)
    lora.round_to_bf16()
    say(f"{len(members)} tasks: answers of the adapters")
    lora.use(len(members))
    after = grouped_answers(base.causal, base.tokenizer, tests, limits, run.evaluation_batch)
    seconds = (time.perf_counter() - started) / len(members)
    results: dict[str, AdapterResult | TrainError] = {}
    for place, member in enumerate(members):
        own, task = losses[place][: member.recipe.steps], member.task
        if (wrong := _not_finite(own)) is not None:
            text = f"task {task.name}: the loss is {own[wrong]} at step {wrong + 1}; lower the learning rate"
            results[task.name] = TrainError(text)
            continue
        card = make_card(task, member.recipe, run, before[place], after[place], own)
        with _complete(member.folder) as folder:
            write_adapter(folder, lora.state(place), base.config, card, task.train)
        results[task.name] = AdapterResult(member.folder, card, tuple(own), seconds)
    return results


def _fit(
    base: GroupedBase,
    lora: GroupedLora,
    members: Sequence[Member],
    say: Callable[[str], None],
    deadline: float,
) -> list[list[float]]:
    """Trains all factors and returns each member's losses, of which those after its last step mean nothing."""
    shared, device = members[0].recipe, lora.values.device
    optimizer = GroupedAdamW(lora.values, shared.weight_decay)
    losses = torch.zeros(shared.steps, len(members), device=device)
    started, passed = time.perf_counter(), 0
    for step in range(shared.steps):
        if time.monotonic() > deadline:
            raise TimeUp("stopped: the time is up")
        active = [member for member in members if step < member.recipe.steps]
        rows = [
            [member.examples[row] for row in batch_rows(len(member.examples), shared.batch_size, step, shared.seed)]
            for member in active
        ]
        lora.use(len(active))
        batch = grouped_batch(rows, base.tokenizer.pad_token_id, device)
        losses[step, : len(active)], found = losses_and_gradients(base.causal, batch, lora.weights)
        gradients = lora.joined(found)
        clip_rows(gradients, shared.gradient_clip)
        rates = [member.recipe.rate(step) if step < member.recipe.steps else 0.0 for member in members]
        optimizer.step(gradients, torch.tensor(rates, device=device))
        passed += len(active)
        if (step + 1) % SAID_EVERY == 0 or step + 1 == shared.steps:
            mean = float(losses[step, : len(active)].mean())  # waits for the device
            speed = passed / (time.perf_counter() - started)
            say(
                f"step {step + 1}/{shared.steps}: {len(active)} tasks, mean loss {mean:.3f}, "
                f"{speed:.1f} task steps/s{_peak(device)}"
            )
    return losses.T.tolist()


def _not_finite(losses: Sequence[float]) -> int | None:
    return next((step for step, loss in enumerate(losses) if not math.isfinite(loss)), None)


def _peak(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f", {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB at most"


@contextlib.contextmanager
def _complete(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place, and that of an older one, once the context is left well."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
