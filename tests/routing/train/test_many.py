import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from routing.train import many
from routing.train.data import Task, TaskDataError, TaskRow, write_task
from routing.train.grouped import Member
from routing.train.many import ManyRun, main, task_names, train_many

RECIPE = {"steps": 40, "batch_size": 8, "learning_rate": 2e-2, "warmup_steps": 5}
RUN = {"evaluation_rows": 4}


def constant(name: str, answer: str, rows: int = 30) -> Task:
    found = [TaskRow(name, "constant", f"Say {name}.", f"number {i}", answer, 0) for i in range(rows + 6)]
    return Task(name, tuple(found[:rows]), tuple(found[rows : rows + 2]), tuple(found[rows + 2 :]))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    write_task(folder, constant("left", "l"))
    write_task(folder, constant("right", "r", rows=10))
    write_task(folder, constant("long", "x" * 600))
    (folder / "manifest.json").write_text(json.dumps({"groups": {"both": ["right", "left"], "gone": ["lost"]}}))
    return folder


def test_each_task_gets_its_adapter_and_a_failed_one_stops_no_other(
    chat_model: Path, root: Path, tmp_path: Path
) -> None:
    order = ManyRun(chat_model, root, tmp_path / "out", epochs=16, recipe=RECIPE, run=RUN)
    said: list[str] = []
    summary = train_many(order, ["left", "right", "long", "lost"], said.append)
    assert json.loads((order.out / "summary.json").read_text()) == summary
    assert summary["failed"].keys() == {"long", "lost"}
    assert "tokens, expected at most 512" in summary["failed"]["long"]
    assert "no such task folder" in summary["failed"]["lost"]
    assert summary["tasks"].keys() == {"left", "right"}
    assert (summary["tasks"]["left"]["steps"], summary["tasks"]["right"]["steps"]) == (40, 20)  # 16 passes
    assert summary["tasks"]["left"]["accuracy_after"] == 1.0
    assert summary["mean"]["accuracy_before"] == 0.0
    assert any(line.startswith("group of 2, ") for line in said)
    for name in ("left", "right"):
        assert (order.out / name / "adapter_model.safetensors").is_file()
    written = (order.out / "left" / "adapter_model.safetensors").stat().st_mtime_ns
    again = train_many(order, ["left", "right"], said.append)
    assert again["tasks"] == summary["tasks"]
    assert again["failed"] == {}
    assert (order.out / "left" / "adapter_model.safetensors").stat().st_mtime_ns == written
    shutil.rmtree(order.out / "left")
    train_many(replace(order, recipe={**RECIPE, "steps": 2}), ["left"], said.append)  # neither folder nor record fits
    assert (order.out / "left" / "card.json").is_file()
    assert json.loads((order.out / "left.json").read_text())["steps"] == 2


def test_out_of_memory_halves_the_group(
    chat_model: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = many.train_group, []

    def tight(base: object, group: list[Member], *arguments: object) -> object:
        sizes.append([member.task.name for member in group])
        if len(group) > 1 or group[0].task.name == "left":
            raise torch.OutOfMemoryError("no room\nfor details")
        return real(base, group, *arguments)

    monkeypatch.setattr(many, "train_group", tight)
    order = ManyRun(chat_model, root, tmp_path / "out", recipe={**RECIPE, "steps": 1}, run=RUN)
    summary = train_many(order, ["left", "right"])
    assert sizes == [["left", "right"], ["left"], ["right"]]
    assert summary["failed"] == {"left": "out of memory: no room"}
    assert summary["tasks"].keys() == {"right"}


def test_time_that_is_up_leaves_the_rest_for_a_later_call(chat_model: Path, root: Path, tmp_path: Path) -> None:
    order = ManyRun(chat_model, root, tmp_path / "out", seconds=-1.0, recipe={**RECIPE, "steps": 1}, run=RUN)
    summary = train_many(order, ["left", "right"])
    assert summary["failed"] == dict.fromkeys(("left", "right"), "not begun: the time is up")
    assert not (order.out / "left").exists()
    assert train_many(replace(order, seconds=600.0), ["left", "right"])["failed"] == {}


def test_names(root: Path) -> None:
    assert task_names(root) == ["left", "long", "right"]
    assert task_names(root, "both") == ["right", "left"]
    assert task_names(root, "both", ("long",)) == ["long"]
    with pytest.raises(TaskDataError, match=r"no group 'all', only both, gone"):
        task_names(root, "all")
    with pytest.raises(TaskDataError, match=r"no task 'lost', expected lost/train.jsonl"):
        task_names(root, "gone")
    with pytest.raises(TaskDataError, match="expected folders"):
        task_names(root / "left")


def test_command_line_names_what_is_wrong(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(tmp_path), "--tasks", str(root), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--only", "nothing"]) == 2
    assert "there is no task 'nothing'" in capsys.readouterr().err
    assert main([*arguments, "--only", "left", "--tasks-at-once", "1"]) == 2
    assert "expected a model folder" in capsys.readouterr().err
