"""`loramux train retriever` and `loramux eval routing`: what they write, and one clear line for what cannot be."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from routing.train.data import Task, TaskRow, write_task
from server import cli

runner = CliRunner()


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    root = tmp_path / "tasks"
    for name in ("plus", "spell"):
        splits = [tuple(TaskRow(name, "c", f"Do {name}.", f"{n} {i}", "x", 0) for i in range(3)) for n in range(3)]
        write_task(root, Task(name, *splits))
    return root


@pytest.mark.parametrize("command", [("train", "retriever"), ("train", "adapter"), ("eval", "routing")])
def test_help_is_there(command: tuple[str, str]) -> None:
    done = runner.invoke(cli.app, [*command, "--help"])
    assert done.exit_code == 0
    assert "--out" in done.output


@pytest.mark.parametrize("command", [("train", "retriever"), ("eval", "routing")])
def test_a_missing_encoder_is_one_line(command: tuple[str, str], tasks: Path, tmp_path: Path) -> None:
    done = runner.invoke(
        cli.app, [*command, "--tasks", str(tasks), "--out", str(tmp_path / "out"), "--data-dir", str(tmp_path)]
    )
    assert done.exit_code == 1
    line = f"{tmp_path}/models/all-minilm-l6-v2: expected a sentence-transformers folder with a modules.json"
    assert done.stderr == f"loramux: {line}\n"


def test_missing_tasks_are_one_line(tmp_path: Path) -> None:
    arguments = ["train", "retriever", "--tasks", str(tmp_path), "--out", str(tmp_path / "out")]
    done = runner.invoke(cli.app, [*arguments, "--data-dir", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"loramux: {tmp_path}: expected folders <task>")


def test_a_router_is_trained_and_evaluated(
    tasks: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "routing"))
    from tiny_encoder import make_encoder

    encoder, out = make_encoder(tmp_path_factory.mktemp("base")), tmp_path / "router"
    common = ["--tasks", str(tasks), "--encoder", str(encoder)]
    done = runner.invoke(cli.app, ["train", "retriever", *common, "--out", str(out), "--steps", "2", "--prefix", ""])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == str(out)
    card = json.loads((out / "router.json").read_text())
    assert (card["kind"], card["name"], card["prefix"], card["mode"]) == ("retriever", "router", "", "head")
    found = runner.invoke(
        cli.app, ["eval", "routing", *common, "--router", str(out), "--out", str(tmp_path / "eval"), "--rows", "2"]
    )
    assert found.exit_code == 0, found.output
    results = json.loads((tmp_path / "eval" / "routing.json").read_text())["results"]
    assert [result["label"] for result in results] == ["untrained"] * 2 + ["router"] * 2
