"""`loramux train extend` and `loramux eval gates`: a router gets one more adapter, and is measured."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from routing.gate_folder import read_gates
from routing.train.data import Task, TaskRow, write_task
from server import cli

runner = CliRunner()
NAMES = ("minus", "plus", "spell")


@pytest.fixture
def given(served_model: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> list[str]:
    """Three tasks with an adapter each, and a router of two of them in `gates`."""
    for seed, name in enumerate(NAMES):
        splits = [tuple(TaskRow(name, "c", f"Do {name}.", f"{n} {i}", "x", 0) for i in range(3)) for n in range(3)]
        write_task(tmp_path / "tasks", Task(name, *splits))
        shutil.copytree(make_adapter(f"{name}-cli", seed=seed, r=2), tmp_path / "adapters" / name)
    common = ["--tasks", str(tmp_path / "tasks"), "--adapters", str(tmp_path / "adapters")]
    common += ["--model", str(served_model)]
    more = ["--out", str(tmp_path / "gates"), "--steps", "2", "--batch", "2", "--group", "two=all,-spell"]
    done = runner.invoke(cli.app, ["train", "meteora", *common, *more, "--samples", "2"])
    assert done.exit_code == 0, done.output
    assert read_gates(tmp_path / "gates").training["rows"] == 4
    return common


def test_an_adapter_joins_and_the_router_is_measured(given: list[str], tmp_path: Path) -> None:
    gates, wide = str(tmp_path / "gates"), str(tmp_path / "wide")
    done = runner.invoke(
        cli.app, ["train", "extend", *given, "--router", gates, "--add", "spell", "--out", wide, "--name", "wide"]
    )
    assert done.exit_code == 0, done.output
    card = read_gates(tmp_path / "wide")
    assert ([adapter.name for adapter in card.adapters], card.name) == (list(NAMES), "wide")
    share = card.training["added"][0]["metrics"]["new_answer"]
    assert f"spell is chosen for its own {share:.1%}" in done.stdout
    assert done.stdout.splitlines()[-1] == wide
    out = tmp_path / "measured"
    more = ["--router", wide, "--router", f"two={gates}", "--out", str(out), "--rows", "2", "--merge", "cat"]
    done = runner.invoke(cli.app, ["eval", "gates", *given, *more, "--new", "spell", "--device", "cpu", "--batch", "4"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [str(out / "gates.md")]
    found = json.loads((out / "gates.json").read_text())
    expected = ["oracle", "base", "merge cat of 1/n each", "wide, top 1", "wide, top 2", "two, top 2"]
    assert list(found["tasks"]) == expected
    assert found["new"]["spell"].keys() == set(expected)


def test_what_cannot_be_is_one_line(given: list[str], tmp_path: Path) -> None:
    def fails(line: str, *arguments: str) -> None:
        done = runner.invoke(cli.app, [*arguments, *given, "--out", str(tmp_path / "out")])
        assert (done.exit_code, done.stderr) == (1, f"loramux: {line}\n")

    gates = str(tmp_path / "gates")
    missing = "adapter none: expected its folder, and a task of its name with rows of what it does"
    fails(missing, "train", "extend", "--router", gates, "--add", "none")
    unread = "router.json: expected a readable file (No such file or directory)"
    fails(unread, "train", "extend", "--router", str(tmp_path), "--add", "spell")
    done = runner.invoke(
        cli.app, ["train", "extend", *given, "--router", "nowhere", "--add", "spell", "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 2
    assert "'nowhere'" in done.stderr
    fails("none: expected one of the evaluated tasks, minus, plus, spell", "eval", "gates", "--new", "none")
    fails("router two: there is no folder nowhere", "eval", "gates", "--router", "two=nowhere")
