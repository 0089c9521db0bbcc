"""Trains a token-level router with nothing installed but torch, transformers and safetensors:

python -m routing.train.gates --model DIR --tasks ROOT --adapters DIR --out DIR --device cuda
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from routing.card_file import RouterFolderError
from routing.train.adapter import TrainError
from routing.train.adapter_folders import adapter_folders
from routing.train.data import Task, TaskDataError, read_task
from routing.train.many import task_names
from routing.train.meteora import MeteoraResult, train_meteora
from routing.train.meteora_recipe import MeteoraRecipe, MeteoraRun


def first_rows(task: Task, samples: int | None) -> Task:
    """The task with its first `samples` training rows, None for all."""
    return replace(task, train=task.train[:samples])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Prints the metrics as JSON, then the folder. Exit code 0 done, 2 it cannot be trained."""
    options = vars(_parser().parse_args(arguments))
    try:
        result = _train(options)
    except (RouterFolderError, TaskDataError, TrainError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    metrics = {name: value for name, value in result.card.training.get("metrics", {}).items() if name != "tasks"}
    sys.stdout.write(f"{json.dumps({'seconds': round(result.seconds, 1), **metrics})}\n{result.folder}\n")
    return 0


def _train(options: dict[str, Any]) -> MeteoraResult:
    names = [name for name in task_names(options["tasks"], options["group"]) if name not in options["without"]]
    tasks = [first_rows(read_task(options["tasks"] / name), options["samples"]) for name in names]
    recipe = MeteoraRecipe(**{field.name: options[field.name] for field in fields(MeteoraRecipe)})
    out: Path = options["out"]
    run = MeteoraRun(
        device=options["device"],
        evaluation_rows=options["evaluation_rows"],
        base_name=options["model"].resolve().name,
        name=options["name"] or out.resolve().name,
        progress=False,
    )
    adapters = adapter_folders(options["adapters"], names, narrowed=True, null=recipe.null)
    return train_meteora(options["model"], tasks, adapters, out, recipe, run)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").split(":")[0]
    parser = argparse.ArgumentParser(prog="python -m routing.train.gates", description=about)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--tasks", type=Path, required=True, help="folder of task folders")
    parser.add_argument("--adapters", type=Path, required=True, help="folder of PEFT folders by task")
    parser.add_argument("--out", type=Path, required=True, help="folder that the router is written to")
    parser.add_argument("--group", help="tasks of this group of the manifest [all]")
    parser.add_argument("--without", type=_words, default=(), help="leave these tasks and their adapters out: a,b")
    parser.add_argument("--samples", type=int, help="training rows of a task at most [all]")
    parser.add_argument("--name", help="what the router calls itself [the folder's name]")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--evaluation-rows", type=int, default=MeteoraRun().evaluation_rows, help="0 for no metrics")
    for field in fields(MeteoraRecipe):
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default, help=f"[{field.default}]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
