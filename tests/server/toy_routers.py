"""Routers that commands train within seconds, of two toy tasks, and add to a running server."""

import os
import subprocess
import sys
from pathlib import Path

from routing.train.data import Task, TaskRow, write_task

KEY = "the-admin-key"
NAMES = ("all4", "qv16")
"""Of the tasks, and of their adapters."""


def write_tasks(root: Path) -> Path:
    for name, letters in zip(NAMES, ("ab", "xyz"), strict=True):
        texts = [letters * (2 + number) for number in range(9)]
        rows = tuple(TaskRow(name, "toy", letters, text, letters[-1], 0) for text in texts)
        write_task(root, Task(name, rows[:5], rows[5:7], rows[7:]))
    return root


def loramux(*arguments: str, url: str = "", **env: str) -> str:
    env = {**os.environ, "LORAMUX_URL": url, "LORAMUX_ADMIN_KEY": KEY, **env}
    done = subprocess.run([sys.executable, "-m", "server.cli", *arguments], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(kind: str, out: Path, model: Path, tasks: Path, *more: str) -> Path:
    """The folder `out`, in which the router is."""
    run = ("--tasks", str(tasks), "--model", str(model), "--out", str(out), "--batch", "2")
    printed = loramux("train", kind, *run, *more)
    assert printed.splitlines()[-1] == str(out)
    return out
