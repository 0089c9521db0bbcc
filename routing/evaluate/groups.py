"""Groups of tasks that are reported apart: those of a manifest, and those that are asked for."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from routing.train.data import Task, TaskDataError, read_tasks

ALL = "all"


def read_groups(root: Path, names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Groups of `<root>/manifest.json`, its field `groups`, whose tasks are all in `names`, the largest first.

    Without a manifest, or where none of its groups is there, all tasks are the one group `all`.

    Raises:
        TaskDataError: the manifest is malformed.
    """
    path = root / "manifest.json"
    if not path.is_file():
        return {ALL: tuple(sorted(names))}
    try:
        groups = json.loads(path.read_text(encoding="utf-8")).get("groups", {})
        found = {str(name): tuple(str(task) for task in tasks) for name, tasks in groups.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise TaskDataError(f"{path}: field groups: expected an object of lists of tasks ({error})") from error
    known = {name: tasks for name, tasks in found.items() if tasks and set(tasks) <= set(names)}
    return dict(sorted(known.items(), key=lambda item: -len(item[1]))) or {ALL: tuple(sorted(names))}


def chosen_groups(root: Path, names: Collection[str], given: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """The groups to report: those `given`, else the first of `read_groups`.

    One that is given is a group's name, or `name=part,part`: a part is a task or a group, and with a minus before it
    it is taken away again: `separable=core,-plural,-rhyme`.

    Raises:
        TaskDataError: a group or a task is not there, or a new group holds fewer than two tasks.
    """
    groups = read_groups(root, names)
    known = {ALL: tuple(sorted(names))} | groups
    if not given:
        return dict(list(groups.items())[:1])
    found: dict[str, tuple[str, ...]] = {}
    for text in given:
        name, equals, parts = text.partition("=")
        if equals:
            known[name] = _combined(text, parts.split(","), known, names)
        if name not in known:
            raise TaskDataError(f"group {name}: expected name=task,task or one of {', '.join(known)}")
        found[name] = known[name]
    return found


def chosen_tasks(root: Path, group: str | None) -> list[Task]:
    """The tasks in `root`, all or those of one group as in `chosen_groups`. Raises TaskDataError."""
    found = read_tasks(root)
    if group is None:
        return found
    chosen = next(iter(chosen_groups(root, {task.name for task in found}, [group]).values()))
    return [task for task in found if task.name in chosen]


def _combined(
    text: str, parts: Sequence[str], known: Mapping[str, Sequence[str]], names: Collection[str]
) -> tuple[str, ...]:
    tasks: dict[str, None] = {}
    for part in parts:
        name = part.removeprefix("-")
        if name not in names and name not in known:
            raise TaskDataError(f"group {text}: {name}: expected a task folder or one of {', '.join(known)}")
        for task in known.get(name, (name,)):
            if part.startswith("-"):
                tasks.pop(task, None)
            else:
                tasks[task] = None
    if len(tasks) < 2:
        raise TaskDataError(f"group {text}: expected at least two tasks, got {len(tasks)}")
    return tuple(tasks)
