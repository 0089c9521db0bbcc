"""The administering commands without a server: wrong usage, help, and that there is none."""

import socket

import pytest
from commands import line_of
from typer.testing import CliRunner

from server import cli

runner = CliRunner()


@pytest.mark.parametrize(
    "arguments",
    [
        ["adapters"],
        ["adapters", "add", "x"],
        ["adapters", "fly"],
        ["tenants", "add", "x", "--max-bytes", "lots"],
        ["tenants", "add", "x", "--concurrency", "-1"],
        ["keys", "add"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    assert runner.invoke(cli.app, arguments).exit_code == 2


@pytest.mark.parametrize(
    "command",
    [
        "adapters add",
        "adapters list",
        "adapters show",
        "adapters rm",
        "adapters pin",
        "adapters rollback",
        "adapters prefetch",
        "adapters merge",
        "tenants add",
        "tenants list",
        "tenants show",
        "tenants set",
        "tenants rm",
        "keys add",
        "keys list",
        "keys revoke",
        "usage",
        "state",
        "routers add",
        "routers list",
        "routers show",
        "routers rm",
        "routers default",
        "explain",
    ],
)
def test_help_has_examples(command: str) -> None:
    done = runner.invoke(cli.app, [*command.split(), "--help"], env={"COLUMNS": "120"})
    assert done.exit_code == 0
    assert f"loramux {command} " in done.stdout.partition("Examples:")[2] + " "
    assert "LORAMUX_URL" in done.stdout


def test_no_server() -> None:
    with socket.socket() as silent:  # it has the port, so that nobody else gets it, and does not listen
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = runner.invoke(cli.app, ["state", "--url", url])
    assert done.exit_code == 1
    assert f"no server at {url}" in line_of(done)
    assert "loramux serve --model" in line_of(done)
