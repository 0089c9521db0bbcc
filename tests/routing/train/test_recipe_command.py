"""`python -m routing.train.meteora`: the router of `train_meteora`, on some rows of some tasks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from meteora_world import toy_task, write_adapter

from routing.gate_folder import load_gates, read_gates
from routing.train.adapter import TrainError
from routing.train.data import write_task
from routing.train.meteora import train_meteora
from routing.train.meteora_recipe import MeteoraRecipe
from routing.train.recipe_command import run_command
from routing.train.router_recipe import RouterRun

TASKS = [toy_task("ab", "ab"), toy_task("pq", "pq"), toy_task("xyz", "xyz")]


def test_a_router_is_trained_on_some_rows_of_some_tasks(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, task in enumerate(TASKS):
        write_task(tmp_path / "tasks", task)
        write_adapter(tmp_path / "adapters" / task.name, chat_model, {"q_proj": 2}, seed=seed)
    common = ["--model", str(chat_model), "--tasks", str(tmp_path / "tasks"), "--adapters", str(tmp_path / "adapters")]
    more = [
        "--samples",
        "2",
        "--group",
        "rest=all,-pq",
        "--plain",
        "--steps",
        "3",
        "--batch-size",
        "2",
        "--packed",
        "0.5",
        "--seed",
        "4",
    ]
    assert run_command("meteora", [*common, *more, "--out", str(tmp_path / "some")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1] == str(tmp_path / "some")
    assert json.loads(said[0])["split"] == "valid"
    recipe = MeteoraRecipe(steps=3, batch_size=2, packed=0.5, seed=4)
    run = RouterRun(progress=False, base_name=chat_model.name)
    tasks = [replace(task, train=task.train[:2]) for task in (TASKS[0], TASKS[2])]
    adapters = {task.name: tmp_path / "adapters" / task.name for task in tasks}
    result = train_meteora(chat_model, tasks, adapters, tmp_path / "same", recipe, run)
    assert read_gates(tmp_path / "some").sha256 == result.card.sha256
    assert result.card.training["rows"] == 4
    assert len(next(iter(load_gates(tmp_path / "some").values()))) == 2


def test_products_in_bfloat16_are_trained_in_float32(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in TASKS:
        write_task(tmp_path / "tasks", task)
    options = ["--model", str(chat_model), "--tasks", str(tmp_path / "tasks"), "--plain", "--evaluation-rows", "2"]
    losses = {}
    for kind in ("milora", "moelora"):
        for precision in ("auto", "float32", "bfloat16"):
            out = tmp_path / f"{kind}-{precision}"
            more = ["--steps", "2", "--batch-size", "3", "--precision", precision, "--out", str(out)]
            assert run_command(kind, [*options, *more]) == 0
            losses[kind, precision] = json.loads(capsys.readouterr().out.splitlines()[0])["loss"]
        assert losses[kind, "auto"] == losses[kind, "float32"]
        assert losses[kind, "bfloat16"] != losses[kind, "float32"]
        assert losses[kind, "bfloat16"] == pytest.approx(losses[kind, "float32"], rel=0.02)
    assert all(gate.dtype == torch.float32 for gate in load_gates(tmp_path / "moelora-bfloat16").values())


def test_a_precision_that_there_is_not_is_refused() -> None:
    with pytest.raises(TrainError, match="precision half: expected auto or bfloat16 or float32"):
        RouterRun(precision="half").check()
    assert not RouterRun().autocast()._enabled
    assert RouterRun(precision="bfloat16").autocast()._enabled
