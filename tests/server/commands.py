"""The command line against a running server, from a test that shares its event loop."""

import asyncio
from collections.abc import Awaitable, Callable

from typer.testing import CliRunner, Result

from server import cli

Loramux = Callable[..., Awaitable[Result]]


def commands(url: str, admin_key: str) -> Loramux:
    """`await loramux("adapters", "list")` as the administrator, or with another `key`; it has to exit with `code`."""

    async def run(*arguments: str, key: str | None = admin_key, code: int = 0) -> Result:
        environment = {"LORAMUX_URL": url, "LORAMUX_ADMIN_KEY": key}
        done = await asyncio.to_thread(CliRunner().invoke, cli.app, list(arguments), env=environment)
        assert done.exit_code == code, done.output
        assert done.exception is None or isinstance(done.exception, SystemExit)
        return done

    return run


def line_of(done: Result) -> str:
    """The one line of a command that failed."""
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("loramux: ")
    return line
