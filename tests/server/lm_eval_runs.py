"""Runs of lm-eval, in a process of their own: what to run comes as JSON on stdin, what came out goes into a file."""

import json
import sys
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager


def evaluate(run: dict[str, Any], manager: TaskManager) -> dict[str, Any]:
    """Metrics by task, and what the model said to each item: of log-likelihoods also whether it was greedy."""
    results = lm_eval.simple_evaluate(
        model=run["model"],
        model_args=run["arguments"],
        tasks=run["tasks"],
        task_manager=manager,
        apply_chat_template=run["chat"],
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    return {
        "metrics": {
            name: {key: results["results"][name][key] for key in run["metrics"][name]} for name in run["tasks"]
        },
        "said": {name: [sample["resps"] for sample in results["samples"][name]] for name in run["tasks"]},
    }


def main() -> None:
    asked = json.load(sys.stdin)
    manager = TaskManager(include_path=asked["folder"], include_defaults=False)
    found = {run["name"]: evaluate(run, manager) for run in asked["runs"]}
    with open(asked["out"], "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
