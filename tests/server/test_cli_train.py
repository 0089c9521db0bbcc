"""`loramux train` and `loramux eval routing`: what they write, and one clear line for what cannot be."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from routing.gate_folder import read_gates
from routing.train.adapter import TrainError
from routing.train.data import Task, TaskRow, write_task
from routing.train.meteora_recipe import MeteoraRecipe
from server import cli

runner = CliRunner()


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    root = tmp_path / "tasks"
    for name in ("plus", "spell"):
        splits = [tuple(TaskRow(name, "c", f"Do {name}.", f"{n} {i}", "x", 0) for i in range(3)) for n in range(3)]
        write_task(root, Task(name, *splits))
    return root


@pytest.mark.parametrize(
    "command", [("train", "retriever"), ("train", "adapter"), ("train", "meteora"), ("eval", "routing")]
)
def test_help_is_there(command: tuple[str, str]) -> None:
    done = runner.invoke(cli.app, [*command, "--help"])
    assert done.exit_code == 0
    assert "--out" in done.output


@pytest.mark.parametrize("command", [("train", "adapter"), ("eval", "routing")])
def test_threads_are_told_how_long_to_spin_before_torch_is_loaded(command: tuple[str, str]) -> None:
    program = (
        "import os, sys; from typer.testing import CliRunner; from server import cli\n"
        "assert 'torch' not in sys.modules\n"
        f"CliRunner().invoke(cli.app, {[*command]})\n"
        "print(os.environ['GOMP_SPINCOUNT'])"
    )
    for given, found in ((None, "10000"), ("7", "7")):
        environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
        environment |= {} if given is None else {"GOMP_SPINCOUNT": given}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert (done.stdout, done.returncode) == (f"{found}\n", 0), done.stderr


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


@pytest.mark.parametrize(
    ("given", "usual"),
    [
        (["--mode", "head"], (2000, 2e-3)),
        (["--mode", "lora"], (1000, 5e-4)),
        (["--mode", "full"], (1000, 2e-5)),
        (["--mode", "full", "--steps", "7", "--learning-rate", "0.1"], (7, 0.1)),
    ],
)
def test_each_mode_of_a_retriever_has_its_usual_recipe(
    given: list[str],
    usual: tuple[int, float],
    tasks: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "routing"))
    from tiny_encoder import make_encoder

    from routing.train import retriever

    asked: list[retriever.RetrieverRecipe] = []

    def train(_folder: Path, _tasks: object, _out: Path, recipe: retriever.RetrieverRecipe, _run: object) -> None:
        asked.append(recipe)
        raise retriever.RetrieverError("only its recipe was wanted")

    monkeypatch.setattr(retriever, "train_retriever", train)
    encoder = make_encoder(tmp_path_factory.mktemp("base"))
    arguments = ["--tasks", str(tasks), "--encoder", str(encoder), "--out", str(tmp_path / "out")]
    done = runner.invoke(cli.app, ["train", "retriever", *arguments, *given])
    assert (done.exit_code, "only its recipe" in done.output) == (1, True)
    assert [(recipe.mode, (recipe.steps, recipe.learning_rate)) for recipe in asked] == [(given[1], usual)]


@pytest.fixture
def adapters(make_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder of its own: other tests make adapters too."""
    for seed, name in enumerate(("plus", "spell")):
        shutil.copytree(make_adapter(name, seed=seed, r=2 + seed), tmp_path / "adapters" / name)
    return tmp_path / "adapters"


@pytest.fixture
def arguments(tasks: Path, adapters: Path, served_model: Path, tmp_path: Path) -> list[str]:
    """A token-level router of two adapters and one task without."""
    splits = [tuple(TaskRow("other", "c", f"Do nothing {n}.", f"{n} {i}", "x", 0) for i in range(3)) for n in range(3)]
    write_task(tasks, Task("other", *splits))
    given = ["train", "meteora", "--tasks", str(tasks), "--adapters", str(adapters), "--model", str(served_model)]
    return [*given, "--out", str(tmp_path / "gates"), "--steps", "2", "--batch", "3"]


OPTIONS = {
    "--top-k": 3,
    "--temperature": 1.5,
    "--beta": 2.0,
    "--packed": 0.5,
    "--learning-rate": 3e-3,
    "--max-length": 300,
    "--seed": 4,
}


def test_a_token_level_router_is_trained(arguments: list[str], tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "gates"
    more = [str(part) for option in OPTIONS.items() for part in option]
    done = runner.invoke(cli.app, [*arguments, *more, "--null", "--joint", "--white", "--name", "mine"])
    assert done.exit_code == 0, done.output
    said = done.stdout.splitlines()
    assert said[0] == "2 adapters; without one: other"
    assert said[-1] == str(out)
    card = read_gates(out)
    assert ([adapter.name for adapter in card.adapters], card.has_null) == (["plus", "spell"], True)
    assert (card.base_name, card.name, card.top_k, card.temperature) == ("tiny", "mine", 3, 1.5)
    share = card.training["metrics"]["gate_accuracy_apart"]
    assert f"the task's: {share:.1%} from the first token on that differs between tasks" in done.stdout
    fields = {option[2:].replace("-", "_"): value for option, value in OPTIONS.items()}
    assert card.training["recipe"] == {
        **asdict(MeteoraRecipe()),
        **fields,
        "null": True,
        "joint": True,
        "white": True,
        "steps": 2,
        "batch_size": 3,
    }
    assert card.training["null_tasks"] == ["other"]
    (tasks / "manifest.json").write_text(json.dumps({"groups": {"both": ["plus", "spell"]}}))
    grouped = runner.invoke(cli.app, [*arguments, "--group", "both"])
    assert grouped.exit_code == 0, grouped.output
    assert grouped.stdout.splitlines()[0] == "2 adapters"
    card = read_gates(out)
    assert (card.rows, card.name, card.training["tasks"]) == (2, "gates", ["plus", "spell"])


def test_options_that_are_left_out_are_those_of_the_recipe(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def noted(*given: object) -> None:
        found.append(given[4])
        raise TrainError("far enough")

    monkeypatch.setattr("routing.train.meteora.train_meteora", noted)
    done = runner.invoke(cli.app, [*arguments[: arguments.index("--steps")], "--null"])
    assert (done.exit_code, done.stderr) == (1, "loramux: far enough\n")
    assert found == [MeteoraRecipe(null=True)]


def test_adapters_that_do_not_fit_the_tasks_are_one_line(arguments: list[str], adapters: Path, tmp_path: Path) -> None:
    def fails(line: str, *more: str) -> None:
        done = runner.invoke(cli.app, [*arguments, *more])
        assert (done.exit_code, done.stderr) == (1, f"loramux: {line}\n")

    place = f"expected the folder {adapters}/other, or --null for a row of the router that stands for no adapter"
    fails(f"task other: it has no adapter, {place}")
    nowhere = tmp_path / "nowhere"
    wanted = "expected a folder of adapter folders that are named like the tasks"
    fails(f"{nowhere}: {wanted}", "--adapters", str(nowhere))
    itself = adapters / "plus"
    fails(f"{itself}: it is an adapter itself, expected the folder of all adapters", "--adapters", str(itself))
    (tmp_path / "file").write_text("")
    fails(f"{tmp_path}/file: it is a file, expected a folder to write to", "--null", "--out", str(tmp_path / "file"))
    fails("device tpu: expected cpu or cuda", "--null", "--device", "tpu")
    shutil.copytree(adapters / "plus", adapters / "othr")
    fails(f"{adapters}/othr: there is no task of this name, expected one of other, plus, spell", "--null")


def test_a_missing_model_is_one_line(tasks: Path, tmp_path: Path) -> None:
    arguments = ["--tasks", str(tasks), "--adapters", str(tmp_path), "--out", str(tmp_path / "out")]
    done = runner.invoke(cli.app, ["train", "meteora", *arguments, "--data-dir", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr == "loramux: model 'smollm2-135m' is not here yet, run `loramux pull smollm2-135m` first\n"
