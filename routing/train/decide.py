"""Writes a trained MoA router that makes its decision in another way:

python -m routing.train.decide --router DIR --decision last --out DIR

Over frozen adapters all layers' routers learn alike, whatever is made of their votes later: one training is enough.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from routing.card_file import RouterFolderError
from routing.prompt_folder import MOA, PromptCard, load_prompt_router, write_prompt_router
from routing.prompt_router import BY_LAYER, DECISIONS, LAST_LAYER
from routing.train.adapter import TrainError, check_out

KEPT = ("split", "entropy", "class_loss", "accuracy_by_layer", "accuracy_by_depth")
"""Metrics that do not depend on the decision."""


def decide(router: Path, decision: str, out: Path) -> PromptCard:
    """The router of the folder `router` with all its layers, deciding by `decision`, in the folder `out`.

    Of its metrics it keeps those that do not depend on the decision; `accuracy` follows from them for "last" and
    "layer".

    Raises:
        TrainError: it is no MoA router over frozen adapters, or `out` is no folder.
        RouterFolderError: the folder cannot be read.
    """
    check_out(out)
    card, weights = load_prompt_router(router)
    if card.kind != MOA or card.training.get("recipe", {}).get("joint"):
        raise TrainError(f"{router}: expected a MoA router over adapters that were frozen")
    found = card.training.get("metrics", {})
    metrics: dict[str, Any] = {name: found[name] for name in KEPT if name in found}
    by_layer = metrics.get("accuracy_by_layer")
    if by_layer and decision in (LAST_LAYER, BY_LAYER) and card.form.top_k == 1:
        metrics["accuracy"] = by_layer[-1] if decision == LAST_LAYER else round(sum(by_layer) / len(by_layer), 4)
    recipe = {**card.training.get("recipe", {}), "decision": decision, "depth": None}
    training = {**card.training, "recipe": recipe, "metrics": metrics}
    form = replace(card.form, decision=decision, depth=None)
    name = out.resolve().name
    return write_prompt_router(out, replace(card, form=form, training=training, name=name), weights.layers)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Prints the folder. Exit code 0 done, 2 it cannot be done."""
    asked = _parser().parse_args(arguments)
    try:
        decide(asked.router, asked.decision, asked.out)
    except (RouterFolderError, TrainError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{asked.out}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").split(":")[0]
    parser = argparse.ArgumentParser(prog="python -m routing.train.decide", description=about)
    parser.add_argument("--router", type=Path, required=True, help="folder of the trained router")
    parser.add_argument("--decision", choices=DECISIONS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder that the new router is written to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
