"""Progress on stderr: a bar, or lines."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

Report = Callable[[str, tuple[int, int] | None], None]
"""`report(description, (done, total))`; None in place of the numbers for work of unknown length."""


@contextlib.contextmanager
def progress_bar(enabled: bool) -> Iterator[Report]:
    """One bar while the context lasts; nothing at all if not `enabled`."""
    if not enabled:
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=None)

        def report(description: str, done: tuple[int, int] | None) -> None:
            completed, total = done or (0, None)
            progress.update(bar, description=description, completed=completed, total=total)

        yield report


def say(text: str) -> None:
    """A line to standard error, at once."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
