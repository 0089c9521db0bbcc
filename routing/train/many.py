"""Trains one adapter for each task of a folder, many at the same time in one process:

python -m routing.train.many --model DIR --tasks ROOT --group core --out DIR --device cuda
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from routing.train.adapter import AdapterRecipe, AdapterResult, AdapterRun, TrainError, run_digest
from routing.train.batches import encode
from routing.train.data import TaskDataError, read_task
from routing.train.grouped import GroupedBase, Member, TimeUp, load_base, train_group
from routing.train.progress import say
from routing.train.task_groups import row_token_budget, task_groups

LONGEST = 512
"""Tokens of a row. Rows are padded to the longest of their batch, so that a high limit costs nothing."""

EPOCHS = 16
"""Most passes over a task's rows: 400 steps of 32 rows over 800 of them."""

TASKS_AT_ONCE = {"cuda": 12, "cpu": 4}
"""More tasks fill a large GPU no better and pad more: short rows wait for those of the longest task."""

SUMMARY = "summary.json"

Say = Callable[[str], None]


@dataclass(frozen=True)
class ManyRun:
    """How the tasks are trained; `recipe` and `run` change fields of `AdapterRecipe` and `AdapterRun`.

    At most `tasks_at_once` are trained together. After `seconds` no group goes on; a later call with the same settings
    leaves finished tasks alone and trains the others from the start.
    """

    model: Path
    tasks: Path
    out: Path
    tasks_at_once: int | None = None
    epochs: int = EPOCHS
    seconds: float | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    def adapter_recipe(self) -> AdapterRecipe:
        """The recipe of a task with plenty of rows."""
        return AdapterRecipe(**{"max_length": LONGEST, **self.recipe})

    def adapter_run(self) -> AdapterRun:
        """How it is carried out."""
        return AdapterRun(**{"progress": False, "base_name": self.model.name, **self.run})


def train_many(order: ManyRun, names: Sequence[str], say: Say = lambda _: None) -> dict[str, Any]:
    """Trains an adapter for every task in `names` into `<out>/<task>`, and writes `<out>/summary.json`.

    Returns the summary. A task that fails is named there under `failed`, with its reason, and stops no other one.

    Raises:
        TrainError: the model cannot be loaded.
    """
    started = time.perf_counter()
    deadline = math.inf if order.seconds is None else time.monotonic() + order.seconds
    order.out.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    wanted = _unfinished(order, names, failed)
    if wanted:
        base = load_base(order.model, order.adapter_recipe(), order.adapter_run().device)
        _train(order, base, _encoded(base, wanted, failed), failed, say, deadline)
    for name, reason in sorted(failed.items()):
        say(f"{name}: failed, {reason}")
    summary = summarise(order, names, failed, time.perf_counter() - started)
    _write(order.out / SUMMARY, summary)
    return summary


def _unfinished(order: ManyRun, names: Sequence[str], failed: dict[str, str]) -> list[Member]:
    """The tasks whose record is missing or of another order; their rows are not encoded yet."""
    found = []
    for name in names:
        try:
            task = read_task(order.tasks / name)
        except TaskDataError as error:
            failed[name] = str(error)
            continue
        recipe = order.adapter_recipe()
        steps = min(recipe.steps, -(-order.epochs * len(task.train) // recipe.batch_size))
        recipe = replace(recipe, steps=steps, warmup_steps=min(recipe.warmup_steps, steps // 2))
        member = Member(task, (), recipe, order.out / name)
        known = _read(order.out / f"{name}.json")
        there = (member.folder / "adapter_model.safetensors").is_file()
        if not there or known is None or not _identity(order, member).items() <= known.items():
            found.append(member)
    return found


def _encoded(base: GroupedBase, members: Sequence[Member], failed: dict[str, str]) -> list[Member]:
    found = []
    for member in members:
        try:
            examples = encode(base.tokenizer, member.task.train, member.recipe.max_length)
        except TaskDataError as error:
            failed[member.task.name] = str(error)
        else:
            found.append(replace(member, examples=examples))
    return found


def _train(
    order: ManyRun, base: GroupedBase, members: Sequence[Member], failed: dict[str, str], say: Say, deadline: float
) -> None:
    device = torch.device(order.adapter_run().device)
    by_name = {member.task.name: member for member in members}
    longest = {name: max(len(example.ids) for example in member.examples) for name, member in by_name.items()}
    most = order.tasks_at_once or TASKS_AT_ONCE.get(device.type, TASKS_AT_ONCE["cpu"])
    budget = row_token_budget(base.causal.config, device, order.adapter_recipe().batch_size)
    waiting = task_groups(longest, most, budget)
    while waiting:
        names = waiting.pop(0)
        if time.monotonic() > deadline:
            failed |= dict.fromkeys(names, "not begun: the time is up")
            continue
        say(f"group of {len(names)}, rows up to {max(longest[name] for name in names)} tokens: {', '.join(names)}")
        results = _train_group(order, base, [by_name[name] for name in names], say, deadline)
        if results is None:  # out of memory
            half = len(names) // 2
            waiting[:0] = [names[:half], names[half:]]
            continue
        for name, result in results.items():
            if isinstance(result, TrainError):
                failed[name] = str(result)
            else:
                say(_record(order, by_name[name], result))


def _train_group(
    order: ManyRun, base: GroupedBase, group: Sequence[Member], say: Say, deadline: float
) -> Mapping[str, AdapterResult | TrainError] | None:
    """The group's results, or None if it takes more memory than there is and can be split."""
    try:
        return train_group(base, group, order.adapter_run(), say, deadline)
    except TimeUp as error:
        return {member.task.name: error for member in group}
    except torch.OutOfMemoryError as error:
        if len(group) == 1:
            return {group[0].task.name: TrainError(f"out of memory: {error}".splitlines()[0])}
        say(f"out of memory with {len(group)} tasks at once: now in two halves")
    torch.cuda.empty_cache()
    return None


def _identity(order: ManyRun, member: Member) -> dict[str, Any]:
    run = order.adapter_run()
    return {
        "digest": run_digest(member.recipe, member.task),
        "base_model": run.base_name,
        "evaluation_rows": run.evaluation_rows,
    }


def _record(order: ManyRun, member: Member, result: AdapterResult) -> str:
    """Writes the record of a finished task and returns the line to say."""
    card = result.card
    record = {
        "task": card.task,
        "cluster": card.cluster,
        **_identity(order, member),
        "steps": member.recipe.steps,
        "train_rows": card.train_rows,
        "test_rows": card.test_rows,
        "accuracy_before": card.accuracy_before,
        "accuracy_after": card.accuracy_after,
        "final_loss": card.final_loss,
        "seconds": round(result.seconds, 1),
    }
    _write(order.out / f"{card.task}.json", record)
    return (
        f"{card.task}: exact match {card.accuracy_before:.1%} -> {card.accuracy_after:.1%}, "
        f"loss {card.final_loss:.4f}, {member.recipe.steps} steps"
    )


def summarise(order: ManyRun, names: Sequence[str], failed: dict[str, str], seconds: float) -> dict[str, Any]:
    """What stands in `summary.json`: the records of all finished tasks, means over them, and the failures."""
    records = {name: _read(order.out / f"{name}.json") for name in sorted(names) if name not in failed}
    tasks = {name: record for name, record in records.items() if record is not None}
    means = {
        key: sum(record[key] for record in tasks.values()) / len(tasks) if tasks else None
        for key in ("accuracy_before", "accuracy_after")
    }
    settings = {key: value for key, value in asdict(order).items() if key not in ("model", "tasks", "out")}
    return {
        "base_model": order.model.name,
        "settings": settings,
        "seconds": round(seconds, 1),
        "mean": means,
        "tasks": tasks,
        "failed": dict(sorted(failed.items())),
    }


def task_names(root: Path, group: str | None = None, only: Sequence[str] = ()) -> list[str]:
    """The tasks named in `only`, else those of a group in `<root>/manifest.json`, else all folders with a train.jsonl.

    Raises:
        TaskDataError: there is no such task or group.
    """
    found = sorted(path.parent.name for path in root.glob("*/train.jsonl"))
    wanted: Sequence[str] = only or found
    if group is not None and not only:
        groups = (_read(root / "manifest.json") or {}).get("groups", {})
        if group not in groups:
            raise TaskDataError(f"{root / 'manifest.json'}: there is no group {group!r}, only {', '.join(groups)}")
        wanted = groups[group]
    if missing := [name for name in wanted if name not in found]:
        raise TaskDataError(f"{root}: there is no task {missing[0]!r}, expected {missing[0]}/train.jsonl")
    if not wanted:
        raise TaskDataError(f"{root}: expected folders <task>/{{train,valid,test}}.jsonl")
    return list(wanted)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 0 all trained, 1 some failed, 2 the arguments or the model are wrong."""
    asked = _parser().parse_args(arguments)

    recipe = {key: getattr(asked, key) for key in ("rank", "alpha", "learning_rate", "steps", "max_length", "seed")}
    run = {key: getattr(asked, key) for key in ("device", "evaluation_rows", "base_name")}
    order = ManyRun(
        asked.model,
        asked.tasks,
        asked.out,
        asked.tasks_at_once,
        asked.epochs,
        asked.seconds,
        {key: value for key, value in recipe.items() if value is not None},
        {key: value for key, value in run.items() if value is not None},
    )
    try:
        names = task_names(asked.tasks, asked.group, asked.only or ())
        summary = train_many(order, names, say)
    except (TaskDataError, TrainError) as error:
        say(str(error))
        return 2
    mean = summary["mean"]
    if summary["tasks"]:
        scores = f"exact match {mean['accuracy_before']:.1%} -> {mean['accuracy_after']:.1%}"
        say(f"{len(summary['tasks'])} of {len(names)} tasks in {summary['seconds']:.0f} s, {scores}")
    return 1 if summary["failed"] else 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m routing.train.many", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--tasks", type=Path, required=True, help="folder of task folders")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets <task>/ for each adapter")
    parser.add_argument("--group", help="of manifest.json, e.g. core [all tasks]")
    parser.add_argument("--only", type=_names, help="these tasks: a,b,c")
    parser.add_argument("--tasks-at-once", type=int, help="most tasks that train together [12 on cuda, 4 on cpu]")
    parser.add_argument("--seconds", type=float, help="stop after so long; a later call trains what is missing")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"most passes over a task's rows [{EPOCHS}]")
    parser.add_argument("--steps", type=int, help="most steps of a task [400]")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--alpha", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--max-length", type=int, help=f"tokens of a row; a longer one fails its task [{LONGEST}]")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--evaluation-rows", type=int, help="held-out rows of the accuracies [100]")
    parser.add_argument("--base-name", help="what the adapters call the base model [the folder's name]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
