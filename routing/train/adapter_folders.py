"""A folder of PEFT folders that are named like the tasks they were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapters_store.peft_format import CONFIG_NAME
from routing.train.adapter import TrainError


def adapter_folders(root: Path, tasks: Sequence[str], *, narrowed: bool = False, null: bool = False) -> dict[str, Path]:
    """The adapters' folders under `root` by the names of their tasks, in the tasks' order.

    Args:
        narrowed: `tasks` are not all tasks, so that adapters of others may lie there.
        null: tasks may have no adapter.

    Raises:
        TrainError: `root` is no such folder, an adapter there has no task, or a task has no adapter.
    """
    if not root.is_dir():
        raise TrainError(f"{root}: expected a folder of adapter folders that are named like the tasks")
    if (root / CONFIG_NAME).is_file():
        raise TrainError(f"{root}: it is an adapter itself, expected the folder of all adapters")
    strangers = sorted({path.parent.name for path in root.glob(f"*/{CONFIG_NAME}")} - set(tasks))
    if strangers and not narrowed:
        raise TrainError(f"{root / strangers[0]}: there is no task of this name, expected one of {', '.join(tasks)}")
    found = {name: root / name for name in tasks if (root / name).is_dir()}
    lacking = [name for name in tasks if name not in found]
    if lacking and not null:
        raise TrainError(
            f"task {lacking[0]}: it has no adapter, expected the folder {root / lacking[0]}, "
            "or --null for a row of the router that stands for no adapter"
        )
    return found
