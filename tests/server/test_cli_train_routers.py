"""`loramux train moa` and `milora`, and the same without the command's libraries: `python -m routing.train.moa`."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from routing.prompt_folder import read_prompt_router
from routing.train.adapter import TrainError
from routing.train.data import Task, TaskRow, write_task
from routing.train.prompt_recipe import MiloraRecipe, MoaRecipe
from routing.train.recipe_command import run_command
from server import cli

runner = CliRunner()


@pytest.fixture
def given(served_model: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> list[str]:
    """Three tasks, adapters for two of them, a model that can chat."""
    for seed, name in enumerate(("other", "plus", "spell")):
        splits = [tuple(TaskRow(name, "c", f"Do {name}.", f"{n} {i}", "x", 0) for i in range(3)) for n in range(3)]
        write_task(tmp_path / "tasks", Task(name, *splits))
        if name != "other":
            shutil.copytree(make_adapter(name, seed=seed, r=2 + seed), tmp_path / "adapters" / name)
    return ["--tasks", str(tmp_path / "tasks"), "--model", str(served_model), "--out", str(tmp_path / "out")]


OPTIONS: dict[str, Any] = {"--steps": 2, "--batch": 3, "--learning-rate": 3e-3, "--max-length": 300, "--seed": 4}
FIELDS = {"steps": 2, "batch_size": 3, "router_rate": 3e-3, "max_length": 300, "seed": 4}


def words(options: dict[str, Any]) -> list[str]:
    return [str(part) for option in options.items() for part in option]


def test_a_moa_router_is_trained(given: list[str], tmp_path: Path) -> None:
    own = {"--top-k": 2, "--pooling": "last", "--decision": "last", "--depth": 1, "--eta": 0.5, "--norm": "none"}
    more = ["--adapters", str(tmp_path / "adapters"), "--null", "--joint", "--name", "mine", "--activation", "rational"]
    done = runner.invoke(cli.app, ["train", "moa", *given, *words(OPTIONS | own), *more])
    assert done.exit_code == 0, done.output
    said = done.stdout.splitlines()
    assert said[-1] == str(tmp_path / "out")
    card = read_prompt_router(tmp_path / "out")
    metrics = card.training["metrics"]
    assert said[0] == "2 adapters; without one: other"
    assert said[1].startswith(f"validation rows, the task's adapter is chosen: {metrics['accuracy']:.1%}; by the first")
    assert (card.kind, card.name, card.base_name, card.has_null) == ("moa", "mine", "tiny", True)
    expected = asdict(MoaRecipe()) | FIELDS
    expected |= {option[2:].replace("-", "_"): value for option, value in own.items()}
    assert card.training["recipe"] == expected | {"null": True, "joint": True, "activation": "rational"}
    assert {path.name for path in (tmp_path / "out" / "adapters").iterdir()} == {"plus", "spell"}


def test_milora_routers_are_trained_over_a_new_adapter_and_over_given_ones(given: list[str], tmp_path: Path) -> None:
    own = {"--rank": 2, "--alpha": 6, "--balance": 0.1, "--eta": 0.5, "--coefficients": "fixed", "--pooling": "max"}
    done = runner.invoke(cli.app, ["train", "milora", *given, *words(OPTIONS | own)])
    assert done.exit_code == 0, done.output
    card = read_prompt_router(tmp_path / "out")
    assert done.stdout.splitlines()[-3] == f"adapter: {tmp_path}/out/adapters/out"
    expected = asdict(MiloraRecipe()) | FIELDS | {"adapter_rate": 3e-3}
    expected |= {option[2:].replace("-", "_"): value for option, value in own.items()}
    assert card.training["recipe"] == expected
    assert (card.form.experts, card.form.top_k) == ("modules", 3)
    (tmp_path / "tasks" / "manifest.json").write_text(json.dumps({"groups": {"both": ["plus", "spell"]}}))
    more = ["--adapters", str(tmp_path / "adapters"), "--group", "both", "--activation", "none"]
    done = runner.invoke(cli.app, ["train", "milora", *given, *words(OPTIONS), *more])
    assert done.exit_code == 0, done.output
    card = read_prompt_router(tmp_path / "out")
    accuracy = card.training["metrics"]["accuracy"]
    assert f"layers choose the task's adapter: {accuracy:.1%}" in done.stdout
    assert (card.form.experts, card.form.top_k, card.training["tasks"]) == ("adapters", 1, ["plus", "spell"])


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [("moa", MoaRecipe()), ("milora", MiloraRecipe(experts="adapters", top_k=1)), ("milora", MiloraRecipe())],
)
def test_options_that_are_left_out_are_those_of_the_recipe(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, recipe: object
) -> None:
    found = []

    def noted(*arguments: object) -> None:
        found.append(arguments[4])
        raise TrainError("far enough")

    monkeypatch.setattr(f"routing.train.{kind}.train_{kind}", noted)
    over = recipe != MiloraRecipe()
    more = ["--group", "both=plus,spell", "--adapters", str(tmp_path / "adapters")] if over else []
    done = runner.invoke(cli.app, ["train", kind, *given, *more])
    assert (done.exit_code, done.stderr) == (1, "loramux: far enough\n")
    assert found == [recipe]


def test_what_cannot_be_is_one_line(given: list[str], tmp_path: Path) -> None:
    def fails(line: str, *arguments: str) -> None:
        done = runner.invoke(cli.app, ["train", *arguments])
        assert (done.exit_code, done.stderr) == (1, f"loramux: {line}\n")

    adapters = ["--adapters", str(tmp_path / "adapters"), "--null"]
    fails("eta 0.0: expected a number above 0", "moa", *given, *adapters, "--eta", "0")
    fails("pooling sum: expected attention or mean or last or max", "milora", *given, *adapters, "--pooling", "sum")
    fails("device tpu: expected cpu or cuda", "moa", *given, *adapters, "--device", "tpu")
    done = runner.invoke(cli.app, ["train", "moa", *given])
    assert done.exit_code == 2
    assert "--adapters" in done.stderr


def test_every_field_of_a_recipe_is_an_option_of_the_module(given: list[str], tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('fastapi', 'pydantic', 'msgspec', 'typer', 'zmq', 'sqlalchemy', 'rich', 'peft'):\n"
        "    sys.modules[name] = None\n"
        "from routing.train.recipe_command import run_command\n"
        "sys.exit(run_command('moa', sys.argv[1:]))\n"
    )
    more = ["--adapters", str(tmp_path / "adapters"), "--null", "--plain", "--steps", "2", "--batch-size", "2"]
    done = subprocess.run([sys.executable, "-c", script, *given, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown, folder = done.stdout.splitlines()
    card = read_prompt_router(Path(folder))
    assert json.loads(shown)["accuracy"] == card.training["metrics"]["accuracy"]
    assert card.training["recipe"] == asdict(MoaRecipe(steps=2, batch_size=2, null=True))


def test_the_module_trains_over_linears_and_says_what_is_wrong(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: list[str] = []
    changed = {"top_k": 2, "rank": 3, "alpha": 4, "coefficients": "train", "steps": 1, "batch_size": 2, "seed": 3}
    for field in fields(MiloraRecipe):
        if field.name != "null":
            flags += [f"--{field.name.replace('_', '-')}", str(changed.get(field.name, field.default))]
    assert run_command("milora", [*given, *flags, "--plain", "--evaluation-rows", "0"]) == 0
    assert read_prompt_router(tmp_path / "out").training["recipe"] == asdict(MiloraRecipe(**changed))  # type: ignore[arg-type]
    capsys.readouterr()
    assert run_command("moa", given) == 1
    assert capsys.readouterr().err == "--adapters: expected the folder of all adapters\n"
