"""Trains a retriever: contrastive fine-tuning of a sentence encoder, so that prompts of one task lie together.

The loss is InfoNCE over pairs of the same task, with the other tasks of the batch as negatives (LoraRetriever, section
3.1; van den Oord et al. 2018), from sentence-transformers, in a plain loop.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from routing.encoder_model import PREFIX, EncoderModel
from routing.evaluate.calibration import calibrate
from routing.evaluate.retrieval import TaskTexts, retrieval_accuracy
from routing.router_folder import MODES, RouterCard, rewrite_card, write_router
from routing.train.checkpoint import load_checkpoint, save_checkpoint
from routing.train.data import Task, TaskRow
from routing.train.encoder_change import EncoderChange
from routing.train.pairs import BOTH, FORMS, INPUT, MIXED, batch_pairs, text_of, trained_tasks
from routing.train.progress import Report, progress_bar
from routing.train.whitening import whitening_head

CHECKPOINT = "checkpoint.safetensors"

USUAL: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "lora": MappingProxyType({"steps": 1000, "learning_rate": 5e-4}),
        "full": MappingProxyType({"steps": 1000, "learning_rate": 2e-5}),
    }
)
"""Where a mode differs from the recipe's defaults, which are a head's; docs/results.md has what they gave."""


class RetrieverError(Exception):
    """Training cannot start or go on; one sentence."""


@dataclass(frozen=True, slots=True)
class RetrieverRecipe:
    """Everything that decides the router, bar the encoder and the rows.

    `share` of the tasks are trained on, chosen by `seed`; `samples` rows of each (None: all). A positive is the mean
    of `support` samples. `keep` weighs a pull of every embedding towards the base encoder's: 1 - cosine, on average.
    A head starts from a whitening with this shrinkage, or from the identity if `whitening` is None.
    `learning_rate` is the peak: linear warm-up over `warmup_steps`, then linear decay to zero at `steps`.
    """

    mode: str = "head"
    share: float = 1.0
    samples: int | None = 200
    forms: str = MIXED
    prefix: str = PREFIX
    steps: int = 2000
    tasks: int = 48
    support: int = 2
    learning_rate: float = 2e-3
    temperature: float = 0.05
    keep: float = 0.0
    whitening: float | None = 0.1
    rank: int = 8
    alpha: int = 16
    max_tokens: int = 64
    warmup_steps: int = 20
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, mode: str, **given: Any) -> RetrieverRecipe:
        """The mode's usual steps and learning rate, unless they are given."""
        return cls(**{"mode": mode, **USUAL.get(mode, {}), **given})

    def drawn_forms(self) -> tuple[str, ...]:
        """The query forms that occur in training."""
        return FORMS if self.forms == MIXED else (self.forms,)

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate * (self.steps - step) / max(1, self.steps - self.warmup_steps)


@dataclass(frozen=True, slots=True)
class RetrieverRun:
    """How a recipe is carried out; none of it changes the router beyond rounding.

    After training, `evaluation_rows` validation rows of each task are retrieved among all tasks, and the router's
    `min_score` is calibrated on them; 0 leaves both out.
    """

    device: str = "cpu"
    checkpoint_every: int = 50
    evaluation_rows: int = 20
    prototype_samples: int = 20
    base_name: str = "all-minilm-l6-v2"
    name: str | None = None
    progress: bool = True


@dataclass(frozen=True, slots=True)
class RetrieverResult:
    """What training made: the folder, its card, the loss of each step of this run, seconds."""

    folder: Path
    card: RouterCard
    losses: tuple[float, ...] = field(repr=False)
    seconds: float


def train_retriever(
    encoder_folder: Path,
    tasks: Sequence[Task],
    out: Path,
    recipe: RetrieverRecipe | None = None,
    run: RetrieverRun | None = None,
) -> RetrieverResult:
    """Trains on a share of `tasks` and writes a trained router into the folder `out`.

    Only training rows are learned from; validation rows give the metrics and the threshold; test rows are not read.
    Dropout is off, so a run is a function of recipe and rows. A run that was interrupted goes on from its last
    checkpoint in `out`, if encoder, recipe and rows are the same; on the CPU it ends in the same bits.

    Raises:
        RetrieverError: the recipe is impossible, the device is missing, or the loss is no longer finite.
        EncoderError: the encoder cannot be loaded.
    """
    recipe, run = recipe or RetrieverRecipe(), run or RetrieverRun()
    started = time.perf_counter()
    seen = trained_tasks([task.name for task in tasks], recipe.share, recipe.seed)
    _check(recipe, run, seen)
    encoder = EncoderModel.load(encoder_folder, device=run.device, prefix=recipe.prefix)
    rows = {task.name: task.train[: recipe.samples] for task in tasks if task.name in seen}
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar(run.progress) as report:
        losses, change = _fit(encoder, rows, recipe, run, out / CHECKPOINT, report)
        training: dict[str, Any] = {
            "recipe": asdict(recipe),
            "tasks": seen,
            "rows": sum(len(found) for found in rows.values()),
            "final_loss": round(sum(losses[-10:]) / max(1, len(losses[-10:])), 4),
        }
        card = RouterCard(
            encoder.id, run.base_name, recipe.mode, recipe.prefix, encoder.width, "", run.name, training=training
        )
        card = write_router(out, card, change.tensors())
        if run.evaluation_rows:
            report("held-out rows", None)
            card = _judge(encoder_folder, tasks, seen, out, card, run)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return RetrieverResult(out, card, tuple(losses), time.perf_counter() - started)


def _check(recipe: RetrieverRecipe, run: RetrieverRun, seen: Sequence[str]) -> None:
    if recipe.mode not in MODES:
        raise RetrieverError(f"mode {recipe.mode}: expected one of {', '.join(MODES)}")
    if recipe.forms not in (INPUT, BOTH, MIXED):
        raise RetrieverError(f"forms {recipe.forms}: expected one of {', '.join((INPUT, BOTH, MIXED))}")
    if recipe.whitening is not None and not 0 < recipe.whitening <= 1:
        raise RetrieverError(f"whitening {recipe.whitening}: expected a number above 0 and at most 1")
    if recipe.temperature <= 0:
        raise RetrieverError(f"temperature {recipe.temperature}: expected a number above 0")
    if len(seen) < 2:
        raise RetrieverError(f"{len(seen)} tasks to train on: expected at least 2, as negatives are of other tasks")
    if run.device.startswith("cuda") and not torch.cuda.is_available():
        raise RetrieverError(f"device {run.device}: this PyTorch sees no CUDA device; expected cpu")


def _fit(
    encoder: EncoderModel,
    rows: dict[str, tuple[TaskRow, ...]],
    recipe: RetrieverRecipe,
    run: RetrieverRun,
    checkpoint: Path,
    report: Report,
) -> tuple[list[float], EncoderChange]:
    base = _base_embeddings(encoder, rows, recipe, report)
    try:
        start = _start(base, rows, recipe)
        change = EncoderChange(encoder, recipe.mode, recipe.rank, recipe.alpha, recipe.seed, start)
    except ImportError as error:
        raise RetrieverError("the mode lora needs peft: pip install 'loramux[train]'") from error
    loss_of = _loss(encoder, change, base, recipe)
    weights = change.weights
    optimizer = torch.optim.AdamW(weights.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    identity = _digest(encoder.id, recipe, rows)
    pools = [rows[name] for name in sorted(rows)]
    losses: list[float] = []
    for step in range(load_checkpoint(checkpoint, weights, optimizer, identity), recipe.steps):
        pairs = batch_pairs(pools, recipe.tasks, recipe.support, recipe.forms, step, recipe.seed)
        loss = loss_of(pairs.anchors, pairs.positives)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights.values(), recipe.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise RetrieverError(f"the loss is {losses[-1]} at step {step + 1}; lower the learning rate")
        report(f"loss {losses[-1]:.3f}", (step + 1, recipe.steps))
        if (step + 1) % run.checkpoint_every == 0 and step + 1 < recipe.steps:
            save_checkpoint(checkpoint, weights, optimizer, step + 1, identity)
    return losses, change


Loss = Callable[[Sequence[str], Sequence[Sequence[str]]], Tensor]


def _loss(encoder: EncoderModel, change: EncoderChange, base: dict[str, np.ndarray], recipe: RetrieverRecipe) -> Loss:
    """The loss of anchors and, for each, its positive's samples."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    info_nce = MultipleNegativesRankingLoss(encoder.model, scale=1 / recipe.temperature)

    def loss(anchors: Sequence[str], positives: Sequence[Sequence[str]]) -> Tensor:
        texts = [*anchors, *(text for samples in positives for text in samples)]
        before = torch.from_numpy(np.stack([base[text] for text in texts])) if base else torch.empty(0)
        before = before.to(encoder.model.device)
        if recipe.mode == "head":
            found = change.project(before)
        else:
            found = change.embed([encoder.prefix + text for text in texts], recipe.max_tokens)
        found = torch.nn.functional.normalize(found, dim=1)
        queries, samples = found[: len(anchors)], found[len(anchors) :]
        prototypes = samples.view(len(anchors), -1, encoder.width).mean(1)
        total: Tensor = info_nce.compute_loss_from_embeddings([queries, prototypes], torch.empty(0))
        if recipe.keep:
            total = total + recipe.keep * (1 - (found * before).sum(1)).mean()
        return total

    return loss


def _base_embeddings(
    encoder: EncoderModel, rows: dict[str, tuple[TaskRow, ...]], recipe: RetrieverRecipe, report: Report
) -> dict[str, np.ndarray]:
    """The base encoder's embedding of every text that may be drawn, where the recipe needs it."""
    if recipe.mode != "head" and not recipe.keep:
        return {}
    texts = sorted({text_of(row, form) for found in rows.values() for row in found for form in recipe.drawn_forms()})
    embedded: dict[str, np.ndarray] = {}
    for first in range(0, len(texts), 256):
        report("the base encoder's embeddings", (first, len(texts)))
        part = texts[first : first + 256]
        embedded |= dict(zip(part, encoder.embed(part), strict=True))
    return embedded


def _start(base: dict[str, np.ndarray], rows: dict[str, tuple[TaskRow, ...]], recipe: RetrieverRecipe) -> Tensor | None:
    if recipe.mode != "head" or recipe.whitening is None:
        return None
    forms = recipe.drawn_forms()
    groups = [np.stack([base[text_of(row, form)] for row in rows[name]]) for name in sorted(rows) for form in forms]
    return torch.from_numpy(whitening_head(groups, recipe.whitening))


def _judge(
    encoder_folder: Path,
    tasks: Sequence[Task],
    seen: Sequence[str],
    out: Path,
    card: RouterCard,
    run: RetrieverRun,
) -> RouterCard:
    """Metrics on validation rows, of the router as it is loaded, and the calibrated threshold; rewrites the card."""
    encoder = EncoderModel.load(encoder_folder, out, device=run.device)
    metrics: dict[str, Any] = {}
    for form in FORMS:
        texts = [TaskTexts.of(t, form, "valid", run.prototype_samples, run.evaluation_rows) for t in tasks]
        embedded = [text.embed(encoder) for text in texts]
        metrics[form] = retrieval_accuracy(embedded, seen=seen)
        if form == BOTH:
            calibration = calibrate(encoder, embedded)
    training = {**card.training, "metrics": {"split": "valid", **metrics}, "calibration": asdict(calibration)}
    return rewrite_card(out, replace(card, min_score=calibration.min_score, training=training))


def _digest(encoder_id: str, recipe: RetrieverRecipe, rows: dict[str, tuple[TaskRow, ...]]) -> str:
    content = json.dumps(
        [encoder_id, asdict(recipe), {n: [asdict(r) for r in found] for n, found in rows.items()}], sort_keys=True
    )
    return hashlib.sha256(content.encode()).hexdigest()
