"""What the commands that talk to a running server share: options, the connection, output, exit codes."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from server.admin_client import AdminClient, Reply
    from server.admin_tables import Printer

HERE = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option("--url", envvar="LORAMUX_URL", help="Where the server is.")]
Key = Annotated[
    str | None,
    typer.Option("--key", envvar="LORAMUX_ADMIN_KEY", help="The admin key, or a tenant's for what is its own."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]
Owner = Annotated[str | None, typer.Option("--tenant", help="Whose it is, with the admin key; `default` by default.")]


def examples(*lines: str) -> str:
    """The end of a command's `--help`."""
    return "\n\n".join(["Examples:", *lines])  # markdown joins lines that no empty one separates


@contextlib.contextmanager
def reaching(url: str, key: str | None) -> Iterator["AdminClient"]:
    """A client of the server. What fails is one line, with exit code 1, or 2 where the command itself was wrong."""
    from server.admin_client import AdminClient, AdminError, UsageError

    try:
        with AdminClient(url, key) as client:
            yield client
    except AdminError as error:
        fail(str(error), code=2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def fail(message: str, code: int = 1) -> NoReturn:
    from server.admin_tables import printable

    typer.echo(f"loramux: {printable(' '.join(message.split()))}", err=True)
    raise typer.Exit(code)


def printer() -> "Printer":
    from rich.console import Console

    from server.admin_tables import Printer

    return Printer(Console(highlight=False))


def print_json(answer: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(answer, indent=2))


def given(**fields: object) -> dict[str, object]:
    """Without those that are None: the server decides on these."""
    return {name: value for name, value in fields.items() if value is not None}


def call_patiently(call: Callable[[], "Reply"], what: str) -> "Reply":
    """`call`'s answer, which may take a while; meanwhile a terminal shows `what`."""
    console = _progress_console()
    with console.status(what) if console.is_terminal else contextlib.nullcontext():
        return call()


def upload(client: "AdminClient", path: str, files: Mapping[str, Path], fields: Mapping[str, object]) -> "Reply":
    """POST the files by their form fields, with a bar on a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    total = sum(file.stat().st_size for file in files.values())
    console = _progress_console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task("uploading", total=total)

        def report(count: int) -> None:
            bar.advance(task, count)
            if bar.tasks[0].finished:
                bar.update(task, description="the server checks it")

        return client.upload(path, files, fields, report)


def _progress_console() -> "Console":
    """Not the output, which may go to a file or another program."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)
