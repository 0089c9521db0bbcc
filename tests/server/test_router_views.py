"""Routers on a terminal."""

import io

from rich.console import Console

from server.admin_tables import Printer
from server.router_views import print_router


def test_how_a_router_was_trained_is_said_without_figures_by_task_and_layer() -> None:
    by_layer, by_task = [0.5] * 30, {"pirate": {"accuracy": 0.75}}
    training = {
        "metrics": {"accuracy": 0.96731234, "split": "valid", "accuracy_by_layer": by_layer, "tasks": by_task},
        "recipe": {"beta": 5.0, "null": False},
        "rows": 28000,
        "tasks": ["pirate", "spell"],
    }
    row = {"name": "gates", "kind": "meteora", "mode": None, "stale": False, "problem": None, "adapters": 2}
    row |= {"min_score": None, "members": [{"name": "pirate", "state": "current"}], "encoder": None, "created": 0.0}
    file = io.StringIO()
    print_router(Printer(Console(file=file, width=80, highlight=False)), row | {"training": training}, 1.0)
    shown = [line.split(None, 2) for line in file.getvalue().splitlines() if line.startswith("training")]
    assert shown == [
        ["training", "metrics", "accuracy 0.9673, split valid"],
        ["training", "recipe", "beta 5, null false"],
        ["training", "rows", "28000"],
        ["training", "tasks", "pirate, spell"],
    ]
