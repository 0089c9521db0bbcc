"""Trains one LoRA adapter on one task folder, with `peft`, in a plain loop."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from routing.train.batches import Batch, batch_rows, collate, encode
from routing.train.card import AdapterCard, shown_examples, write_card, write_samples
from routing.train.checkpoint import load_checkpoint, save_checkpoint
from routing.train.data import Task, TaskRow, read_task
from routing.train.exact_match import answer_limit, exact_match, greedy_answers
from routing.train.language_loss import language_loss
from routing.train.progress import Report, progress_bar

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHECKPOINT = "checkpoint.safetensors"


class TrainError(Exception):
    """Training cannot start or go on; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class AdapterRecipe:
    """Everything that decides the adapter, bar the model and the rows.

    `learning_rate` is the peak: linear warm-up over `warmup_steps`, then linear decay to zero at `steps`.
    """

    rank: int = 4
    alpha: int = 8
    targets: tuple[str, ...] = ALL_LINEARS
    learning_rate: float = 2e-3
    steps: int = 400
    batch_size: int = 32
    max_length: int = 256
    warmup_steps: int = 20
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate * (self.steps - step) / max(1, self.steps - self.warmup_steps)


@dataclass(frozen=True, slots=True)
class AdapterRun:
    """How a recipe is carried out; none of it is meant to change the adapter beyond rounding."""

    device: str = "cpu"
    checkpoint_every: int = 100
    evaluation_rows: int = 100
    evaluation_batch: int = 100
    base_name: str = "smollm2-135m"
    progress: bool = True


@dataclass(frozen=True, slots=True)
class AdapterResult:
    """What training made: the folder, the loss of each step of this run, accuracies in [0, 1], seconds."""

    folder: Path
    card: AdapterCard
    losses: tuple[float, ...] = field(repr=False)
    seconds: float


def train_adapter(
    model_folder: Path, task_folder: Path, out: Path, recipe: AdapterRecipe | None = None, run: AdapterRun | None = None
) -> AdapterResult:
    """Trains an adapter on `task_folder` and writes it, with its card, into the folder `out`.

    Loss is counted on the target and the end of turn only. LoRA weights are fp32 during training, under bf16 autocast
    on CUDA; they are saved in bf16 and evaluated as saved, in fp32 arithmetic. A run that was interrupted goes on
    from its last checkpoint in `out`, if recipe and rows are the same.

    Raises:
        TrainError: `peft`, the device or the model is missing, `out` is no folder, or the loss is no longer finite.
        TaskDataError: the rows are malformed or too long.
    """
    recipe, run = recipe or AdapterRecipe(), run or AdapterRun()
    started = time.perf_counter()
    check_out(out)
    task = read_task(task_folder)
    test = task.test[: run.evaluation_rows]
    model, tokenizer = load_model(model_folder, recipe, run.device)
    out.mkdir(parents=True, exist_ok=True)
    limit = answer_limit(tokenizer, test)
    with progress_bar(run.progress) as report:
        report(f"{task.name}: answers of the base", None)
        with model.disable_adapter():
            before = greedy_answers(model, tokenizer, test, limit, run.evaluation_batch)
        losses = _fit(model, tokenizer, task, recipe, run, out / CHECKPOINT, report)
        _round_to_bf16(model)
        report(f"{task.name}: answers of the adapter", None)
        after = greedy_answers(model, tokenizer, test, limit, run.evaluation_batch)
    card = make_card(task, recipe, run, before, after, losses)
    write_adapter(out, _state(model), model.peft_config["default"], card, task.train)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return AdapterResult(out, card, tuple(losses), time.perf_counter() - started)


def answer_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the answer tokens of a batch, fp32 scalar."""
    return language_loss(model.get_base_model(), batch.ids, batch.mask, batch.labels)


def load_model(model_folder: Path, recipe: AdapterRecipe, device: str) -> tuple[Any, Any]:
    """The model with a fresh adapter of the recipe, in fp32, and its tokenizer.

    Raises:
        TrainError: `peft`, the device, the model or its chat template is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise TrainError("training adapters needs peft: pip install 'loramux[train]'") from error
    check_device(device)
    base, tokenizer = load_causal(model_folder)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=recipe.rank, lora_alpha=recipe.alpha, target_modules=sorted(recipe.targets)
    )
    with torch.random.fork_rng(devices=[]):  # initialised on the CPU: the same on every device
        torch.manual_seed(recipe.seed)
        model = get_peft_model(base, config)
    return model.to(device).eval(), tokenizer


def load_causal(model_folder: Path) -> tuple[Any, Any]:
    """The model in fp32 on the CPU, and its tokenizer.

    Raises:
        TrainError: the model, its safetensors weights, its tokenizer or its chat template is missing or damaged.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (model_folder / "config.json").is_file():
        raise TrainError(f"{model_folder}: expected a model folder with a config.json; loramux pull makes one")
    wanted = "a tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_folder), local_files_only=True)
        wanted = "weights in safetensors files"
        causal = AutoModelForCausalLM.from_pretrained(
            str(model_folder), dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise TrainError(f"{model_folder}: expected {wanted} that can be read ({reason})") from error
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise TrainError(f"{model_folder}: expected a tokenizer with a chat template and an end-of-turn token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return causal, tokenizer


def check_device(device: str) -> None:
    """Raise TrainError for a device that nothing is trained on, or that is not here."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise TrainError(f"device {device}: expected cpu or cuda")
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise TrainError(f"device {device}: this PyTorch sees no CUDA device of this number; expected cpu")


def check_out(folder: Path) -> None:
    """Raise TrainError unless it is a folder or can become one."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise TrainError(f"{nearest}: it is a file, expected a folder to write to")


def _fit(
    model: Any, tokenizer: Any, task: Task, recipe: AdapterRecipe, run: AdapterRun, checkpoint: Path, report: Report
) -> list[float]:
    examples = encode(tokenizer, task.train, recipe.max_length)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    identity = run_digest(recipe, task)
    device = torch.device(run.device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    losses: list[torch.Tensor] = []
    for step in range(load_checkpoint(checkpoint, weights, optimizer, identity), recipe.steps):
        rows = batch_rows(len(examples), recipe.batch_size, step, recipe.seed)
        batch = collate([examples[row] for row in rows], tokenizer.pad_token_id, device)
        with autocast:
            loss = answer_loss(model, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights.values(), recipe.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % 10 == 0 or step + 1 == recipe.steps:  # reading the loss waits for the device
            latest = float(losses[-1])
            if not math.isfinite(latest):
                raise TrainError(f"task {task.name}: the loss is {latest} at step {step + 1}; lower the learning rate")
            report(f"{task.name}: loss {latest:.3f}", (step + 1, recipe.steps))
        if (step + 1) % run.checkpoint_every == 0 and step + 1 < recipe.steps:
            save_checkpoint(checkpoint, weights, optimizer, step + 1, identity)
    return torch.stack(losses).tolist() if losses else []


def run_digest(recipe: AdapterRecipe, task: Task) -> str:
    """Identifies recipe and training rows: a checkpoint is continued only under the same digest."""
    content = json.dumps([asdict(recipe), [asdict(row) for row in task.train]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


@torch.no_grad()
def _round_to_bf16(model: Any) -> None:
    for weight in model.parameters():
        if weight.requires_grad:
            weight.copy_(weight.bfloat16())


def make_card(
    task: Task,
    recipe: AdapterRecipe,
    run: AdapterRun,
    before: Sequence[str],
    after: Sequence[str],
    losses: Sequence[float],
) -> AdapterCard:
    """The card of an adapter; `before` and `after` answer the task's first test rows."""
    test = task.test[: run.evaluation_rows]
    return AdapterCard(
        task=task.name,
        cluster=task.train[0].cluster,
        base_model=run.base_name,
        recipe=asdict(recipe) | {"targets": list(recipe.targets)},
        train_rows=len(task.train),
        test_rows=len(test),
        accuracy_before=exact_match(before, test),
        accuracy_after=exact_match(after, test),
        final_loss=round(sum(losses[-10:]) / max(1, len(losses[-10:])), 4),
        examples=shown_examples(test, before, after),
    )


def write_adapter(
    folder: Path, state: Mapping[str, torch.Tensor], config: Any, card: AdapterCard, rows: Sequence[TaskRow]
) -> None:
    """Writes the adapter in bf16 and `peft`'s format, with its card and sample prompts, into an existing folder."""
    from safetensors.torch import save_file

    tensors = {key: tensor.detach().bfloat16().cpu().contiguous() for key, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)
    config.base_model_name_or_path = card.base_model  # a name, not the path it was trained from
    config.inference_mode = True
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["target_modules"] = sorted(fields["target_modules"])  # peft keeps a set: its order is not repeatable
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_card(folder, card)
    write_samples(folder, rows)


def _state(model: Any) -> Mapping[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    state: Mapping[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state
