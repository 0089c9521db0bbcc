"""Bars on the terminal for what a command waits for."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


def progress_bars(console: Console) -> Progress:
    """Bars with a percentage and the time so far; a context manager."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    return Progress(*columns, TimeElapsedColumn(), console=console, redirect_stderr=False, redirect_stdout=False)


@contextlib.contextmanager
def step(bars: Progress, description: str, total: int | None = None) -> Iterator[TaskID]:
    """One bar, pulsing while its size is unknown, full at the end."""
    task = bars.add_task(description, total=total)
    yield task
    bars.update(task, total=total or 1, completed=total or 1)
