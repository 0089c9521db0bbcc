"""Generates the demo's tasks and trains their adapters: `python -m deploy.demo.train --model DIR --out DIR`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from deploy.demo.tasks import SEED, TASKS, write_tasks
from routing.gate_folder import load_gates, write_gates
from routing.prompt_folder import load_prompt_router, write_prompt_router
from routing.prompt_router import ADAPTERS
from routing.train.adapter import AdapterRecipe, AdapterResult, AdapterRun, train_adapter
from routing.train.data import read_tasks
from routing.train.meteora import train_meteora
from routing.train.meteora_recipe import MeteoraRecipe
from routing.train.milora import train_milora
from routing.train.moa import train_moa
from routing.train.prompt_recipe import MiloraRecipe, MoaRecipe
from routing.train.router_recipe import AUTO, PRECISIONS, RouterRun

RECIPE = AdapterRecipe()
GATES = MeteoraRecipe(learning_rate=5e-3, steps=160, batch_size=8, packed=0.25, warmup_steps=10)
"""Of the token-level router; half an hour on two cores."""

MOA = MoaRecipe(steps=60, batch_size=14)
MILORA = MiloraRecipe(
    experts=ADAPTERS, top_k=1, steps=40, batch_size=7, router_rate=5e-3, coefficients_every=10, warmup_steps=5
)
"""Of the routers by prompt."""


def main(arguments: list[str]) -> int:
    """Trains the chosen tasks one after the other; writes `<out>/<task>/` and `<out>/summary.json`."""
    options = _parser().parse_args(arguments)
    run = AdapterRun(device=options.device, progress=not options.plain, evaluation_rows=options.evaluation_rows)
    recipe = AdapterRecipe(steps=options.steps, learning_rate=options.learning_rate)
    with tempfile.TemporaryDirectory() as scratch:
        root = options.data or Path(scratch)
        write_tasks(root, SEED)
        if options.gates is not None:
            train_gates(options, root)
        for folder, prompt_recipe in ((options.moa, MOA), (options.milora, MILORA)):
            if folder is not None:
                train_prompt_router(options, root, folder, prompt_recipe)
        if options.gates or options.moa or options.milora:
            return 0
        for name in options.only or TASKS:
            result = train_adapter(options.model, root / name, options.out / name, recipe, run)
            _say(result)
    write_summary(options.out)
    return 0


def train_gates(options: argparse.Namespace, tasks: Path) -> None:
    """Trains a token-level router over the adapters under `<out>`, into `<gates>`; it is stored in bf16."""
    adapters = {name: options.out / name for name in TASKS}
    run = RouterRun(
        device=options.device, progress=not options.plain, evaluation_rows=6, name="gates", precision=options.precision
    )
    result = train_meteora(options.model, read_tasks(tasks), adapters, options.gates, GATES, run)
    write_gates(result.folder, result.card, load_gates(result.folder), dtype=torch.bfloat16)
    metrics = result.card.training["metrics"]
    sys.stdout.write(f"gates: right where answers are predicted {metrics['gate_accuracy_answer']:.1%}\n")


def train_prompt_router(
    options: argparse.Namespace, tasks: Path, folder: Path, recipe: MoaRecipe | MiloraRecipe
) -> None:
    """Trains a router by prompt over the adapters under `<out>`, into `folder`; it is stored in bf16."""
    adapters = {name: options.out / name for name in TASKS}
    run = RouterRun(device=options.device, progress=not options.plain, evaluation_rows=12, name=folder.name)
    found = read_tasks(tasks)
    if isinstance(recipe, MoaRecipe):
        result = train_moa(options.model, found, adapters, folder, recipe, run)
    else:
        result = train_milora(options.model, found, adapters, folder, recipe, run)
    _, router = load_prompt_router(folder)
    write_prompt_router(folder, result.card, router.layers, dtype=torch.bfloat16)
    accuracy = result.card.training["metrics"]["accuracy"]
    sys.stdout.write(f"{folder.name}: the task's adapter is chosen {accuracy:.1%}, {result.seconds:.0f} s\n")


def write_summary(out: Path) -> None:
    """Collects the cards of every adapter under `out` into `summary.json`."""
    cards = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*/card.json"))]
    keys = ("accuracy_before", "accuracy_after", "final_loss")
    tasks = {card["task"]: {key: card[key] for key in keys} for card in cards}
    text = json.dumps({"data_seed": SEED, "tasks": tasks}, indent=2, sort_keys=True)
    (out / "summary.json").write_text(text + "\n", encoding="utf-8")


def _say(result: AdapterResult) -> None:
    card = result.card
    first = f"{result.losses[0]:.3f}" if result.losses else "-"
    sys.stdout.write(
        f"{card.task:14} exact match {card.accuracy_before:6.1%} -> {card.accuracy_after:6.1%}   "
        f"loss {first} -> {card.final_loss:.4f}   {result.seconds:.0f} s\n"
    )
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo.train", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of smollm2-135m (loramux pull)")
    parser.add_argument("--out", type=Path, required=True, help="where the adapters go, e.g. deploy/demo/adapters")
    parser.add_argument("--only", action="append", choices=sorted(TASKS), help="train this task (repeatable)")
    parser.add_argument("--gates", type=Path, help="train only the token-level router over the adapters, into here")
    parser.add_argument("--moa", type=Path, help="train only the MoA router over the adapters, into here")
    parser.add_argument("--milora", type=Path, help="train only the MiLoRA router over the adapters, into here")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=PRECISIONS, default=AUTO, help="of the model's products, with --gates")
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--learning-rate", type=float, default=RECIPE.learning_rate)
    parser.add_argument("--evaluation-rows", type=int, default=100)
    parser.add_argument("--data", type=Path, help="keep the generated rows in this folder")
    parser.add_argument("--plain", action="store_true", help="no progress bars")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
