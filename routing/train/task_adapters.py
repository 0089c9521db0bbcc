"""The adapters that a router is trained over, each by the name of the task that it was made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from adapters_store.peft_format import AdapterFile, read_adapter
from adapters_store.types import AdapterError
from routing.card_adapters import MAX_ADAPTERS
from routing.train.adapter import TrainError
from routing.train.data import Task
from server.model.config import ModelConfig, ModelError


def named_adapters(tasks: Sequence[Task], adapters: Mapping[str, Path], null: bool) -> list[str]:
    """Names of the tasks that have an adapter, in the tasks' order; that is the order of a router's rows.

    Args:
        null: tasks may have none, and some do.

    Raises:
        TrainError: tasks and adapters do not belong together, or are too few or too many for a router.
    """
    check_names(tasks)
    names = [task.name for task in tasks]
    named = [name for name in names if name in adapters]
    if strangers := sorted(adapters.keys() - set(names)):
        raise TrainError(f"adapter {strangers[0]}: there is no task of this name, expected one for every adapter")
    lacking = [name for name in names if name not in adapters]
    if lacking and not null:
        raise TrainError(f"task {lacking[0]}: it has no adapter, expected one, or a row of the router for no adapter")
    if null and not lacking:
        raise TrainError("null: every task has an adapter, expected a task without one that trains the last row")
    if not 1 <= len(named) <= MAX_ADAPTERS or len(names) < 2:
        raise TrainError(
            f"{len(named)} adapters, {len(names)} tasks: expected 1 to {MAX_ADAPTERS} adapters and at least 2 tasks"
        )
    return named


def check_names(tasks: Sequence[Task]) -> None:
    """Raise TrainError for a task that comes twice."""
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise TrainError(f"task {twice}: comes twice, expected tasks of different names")


def row_labels(tasks: Sequence[Task], named: Sequence[str]) -> tuple[int, ...]:
    """The row of every task's own adapter, the one behind all adapters for tasks without."""
    return tuple(named.index(task.name) if task.name in named else len(named) for task in tasks)


def read_adapters(named: Sequence[str], adapters: Mapping[str, Path], config: ModelConfig) -> dict[str, AdapterFile]:
    """Raises TrainError for an adapter that is missing or does not fit the model."""
    return {name: _adapter(name, adapters[name], config) for name in named}


def model_config(folder: Path) -> ModelConfig:
    """Raises TrainError for a folder that is no model's."""
    try:
        return ModelConfig.from_folder(folder)
    except ModelError as error:
        raise TrainError(str(error)) from error


def _adapter(name: str, folder: Path, config: ModelConfig) -> AdapterFile:
    try:
        return read_adapter(folder, config.linear_shape)
    except AdapterError as error:
        raise TrainError(f"adapter {name}, {folder}: {error.message}") from error
