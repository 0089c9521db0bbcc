"""A training run's state in one safetensors file: weights, optimiser moments and the step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", "step", *MOMENTS)


def save_checkpoint(
    path: Path, weights: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, step: int, run: str
) -> None:
    """Writes the state after `step` steps; `run` names the recipe and data it belongs to. Atomic by rename.

    A weight that was not updated in every step has a count of its own.
    """
    tensors = {f"weight/{name}": weight.detach().cpu().contiguous() for name, weight in weights.items()}
    for name, weight in weights.items():
        state = optimizer.state.get(weight) or {moment: torch.zeros_like(weight) for moment in MOMENTS}
        for moment in MOMENTS:
            tensors[f"{moment}/{name}"] = state[moment].cpu().contiguous()
        tensors[f"step/{name}"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step), "run": run})
    partial.replace(path)


def load_checkpoint(
    path: Path, weights: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, run: str
) -> int:
    """Restores weights and moments in place and returns the steps done: 0 if no checkpoint of `run` is there."""
    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            if metadata.get("run") != run or names != {f"{kind}/{w}" for kind in KINDS for w in weights}:
                return 0
            step = int(metadata["step"])
            for name, weight in weights.items():
                with torch.no_grad():
                    weight.copy_(file.get_tensor(f"weight/{name}"))
                moments = {moment: file.get_tensor(f"{moment}/{name}").to(weight.device) for moment in MOMENTS}
                optimizer.state[weight] = {"step": file.get_tensor(f"step/{name}"), **moments}
    except SafetensorError:  # a foreign or damaged file is no checkpoint
        return 0
    return step
