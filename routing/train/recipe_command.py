"""`python -m routing.train.moa`, `.milora`, `.meteora`, `.moelora`: training where the server's libraries are missing.

Every field of a recipe is an option: `--top-k 2`, `--joint`, `--experts adapters`.
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
from routing.evaluate.groups import chosen_tasks
from routing.train.adapter import TrainError
from routing.train.adapter_folders import adapter_folders
from routing.train.data import Task, TaskDataError
from routing.train.router_recipe import AUTO, PRECISIONS, RouterRun

KINDS = ("moa", "milora", "meteora", "moelora")


def run_command(kind: str, arguments: Sequence[str]) -> int:
    """Trains a router of this kind; prints its losses and metrics as JSON and its folder. 1 if it cannot be trained."""
    recipe_type = _recipe_type(kind)
    options = vars(_parser(kind, recipe_type).parse_args(arguments))
    recipe = recipe_type(**{field.name: options[field.name] for field in fields(recipe_type)})
    try:
        result = _train(kind, options, recipe)
    except (RouterFolderError, TaskDataError, TrainError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    shown = {"seconds": round(result.seconds, 1), "losses": result.losses[-1]}
    sys.stdout.write(f"{json.dumps(shown | result.card.training.get('metrics', {}))}\n{result.folder}\n")
    return 0


def _train(kind: str, options: dict[str, Any], recipe: Any) -> Any:
    from routing.train.meteora import train_meteora
    from routing.train.milora import train_milora
    from routing.train.moa import train_moa
    from routing.train.moelora import train_moelora

    model, out = options["model"], options["out"]
    run = RouterRun(
        device=options["device"],
        evaluation_rows=options["evaluation_rows"],
        base_name=model.resolve().name,
        name=options["name"] or out.resolve().name,
        progress=not options["plain"],
        precision=options["precision"],
    )
    chosen = chosen_tasks(options["tasks"], options["group"])
    tasks = [replace(task, train=task.train[: options["samples"]]) for task in chosen]
    if kind == "moelora":
        return train_moelora(model, tasks, out, recipe, run)
    adapters = _adapters(kind, options, tasks, recipe)
    train: Any = {"moa": train_moa, "milora": train_milora, "meteora": train_meteora}[kind]
    return train(model, tasks, adapters, out, recipe, run)


def _adapters(kind: str, options: dict[str, Any], tasks: Sequence[Task], recipe: Any) -> dict[str, Path]:
    root: Path | None = options["adapters"]
    if root is None:
        if kind == "milora" and recipe.experts == "modules":
            return {}
        raise TrainError("--adapters: expected the folder of all adapters")
    narrowed = options["group"] is not None
    return adapter_folders(root, [task.name for task in tasks], narrowed=narrowed, null=recipe.null)


def _recipe_type(kind: str) -> Any:
    from routing.train.meteora_recipe import MeteoraRecipe
    from routing.train.moelora import MoeLoraRecipe
    from routing.train.prompt_recipe import MiloraRecipe, MoaRecipe

    return dict(zip(KINDS, (MoaRecipe, MiloraRecipe, MeteoraRecipe, MoeLoraRecipe), strict=True))[kind]


def _parser(kind: str, recipe: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m routing.train.{kind}")
    for name in ("model", "tasks", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--group", help="of the manifest, or name=part,part; -part takes away")
    parser.add_argument("--samples", type=int, help="training rows of a task at most [all]")
    parser.add_argument("--name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=PRECISIONS, default=AUTO, help="of the model's products")
    parser.add_argument("--evaluation-rows", type=int, default=20)
    parser.add_argument("--plain", action="store_true", help="no progress bar")
    for field in fields(recipe):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=int if default is None else type(default), default=default)
    return parser
