"""`python -m routing.train.moa` and `.milora`: training with nothing installed but torch, transformers and safetensors.

Every field of the recipe is an option: `--top-k 2`, `--joint`, `--experts adapters`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from routing.card_file import RouterFolderError
from routing.evaluate.groups import chosen_tasks
from routing.prompt_folder import MOA
from routing.prompt_router import MODULES
from routing.train.adapter import TrainError
from routing.train.adapter_folders import adapter_folders
from routing.train.data import TaskDataError
from routing.train.prompt_recipe import MiloraRecipe, MoaRecipe, PromptRun


def run_command(kind: str, arguments: Sequence[str]) -> int:
    """Trains a router of this kind; prints its metrics as JSON and its folder. 1 if it cannot be trained."""
    recipe_type = MoaRecipe if kind == MOA else MiloraRecipe
    options = vars(_parser(kind, recipe_type).parse_args(arguments))
    recipe = recipe_type(**{field.name: options[field.name] for field in fields(recipe_type)})
    out: Path = options["out"]
    run = PromptRun(
        device=options["device"],
        evaluation_rows=options["evaluation_rows"],
        base_name=options["model"].resolve().name,
        name=options["name"] or out.resolve().name,
        progress=not options["plain"],
    )
    try:
        result = _train(options, out, recipe, run)
    except (RouterFolderError, TaskDataError, TrainError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    shown = {"seconds": round(result.seconds, 1), **result.card.training["final_losses"]}
    sys.stdout.write(f"{json.dumps(shown | result.card.training.get('metrics', {}))}\n{result.folder}\n")
    return 0


def _train(options: dict[str, Any], out: Path, recipe: MoaRecipe | MiloraRecipe, run: PromptRun) -> Any:
    from routing.train.milora import train_milora
    from routing.train.moa import train_moa

    tasks = chosen_tasks(options["tasks"], options["group"])
    names = [task.name for task in tasks]
    root: Path | None = options["adapters"]
    if isinstance(recipe, MiloraRecipe) and recipe.experts == MODULES and root is None:
        return train_milora(options["model"], tasks, {}, out, recipe, run)
    if root is None:
        raise TrainError("--adapters: expected the folder of all adapters")
    own = adapter_folders(root, names, narrowed=options["group"] is not None, null=recipe.null)
    if isinstance(recipe, MoaRecipe):
        return train_moa(options["model"], tasks, own, out, recipe, run)
    return train_milora(options["model"], tasks, own, out, recipe, run)


def _parser(kind: str, recipe: type[MoaRecipe] | type[MiloraRecipe]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m routing.train.{kind}")
    for name in ("model", "tasks", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--group")
    parser.add_argument("--name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--evaluation-rows", type=int, default=PromptRun().evaluation_rows)
    parser.add_argument("--plain", action="store_true", help="no progress bar")
    for field in fields(recipe):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=int if default is None else type(default), default=default)
    return parser
