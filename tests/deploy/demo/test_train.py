import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deploy.demo import train
from deploy.demo.tasks import TASKS
from routing.card_adapters import CardAdapter
from routing.card_file import CHANGE_FILE
from routing.prompt_folder import PromptCard, write_prompt_router
from routing.prompt_router import LayerRouter
from routing.train.adapter import AdapterResult
from routing.train.card import AdapterCard, write_card
from routing.train.data import read_task
from routing.train.router_training import PromptResult


def test_trains_the_chosen_tasks_and_sums_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(model: Path, task_folder: Path, out: Path, recipe: Any, run: Any) -> AdapterResult:
        assert (model, run.device, recipe.steps) == (Path("base"), "cpu", 7)
        task = read_task(task_folder)
        out.mkdir(parents=True)
        card = AdapterCard(task.name, "c", "b", asdict(recipe), len(task.train), 1, 0.0, 0.5, 0.1, ())
        write_card(out, card)
        return AdapterResult(out, card, (1.0,), 2.0)

    monkeypatch.setattr(train, "train_adapter", fake)
    arguments = ["--model", "base", "--out", str(tmp_path), "--only", "pirate", "--only", "spell", "--steps", "7"]
    assert train.main(arguments) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["tasks"]) == ["pirate", "spell"]
    assert summary["tasks"]["pirate"] == {"accuracy_before": 0.0, "accuracy_after": 0.5, "final_loss": 0.1}
    assert "pirate         exact match   0.0% ->  50.0%" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["moa", "milora"])
def test_a_router_by_prompt_is_trained_over_all_adapters_and_stored_in_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out, adapters = tmp_path / kind, tmp_path / "adapters"
    digest = "ab" * 32

    def fake(model: Path, tasks: Any, given: Any, folder: Path, recipe: Any, run: Any) -> PromptResult:
        assert (model, run.device, run.name, folder) == (Path("base"), "cpu", kind, out)
        assert given == {name: adapters / name for name in TASKS}
        assert {task.name for task in tasks} == set(TASKS)
        assert recipe is {"moa": train.MOA, "milora": train.MILORA}[kind]
        form = recipe.form(1, len(TASKS))
        own = tuple(CardAdapter(name, digest) for name in TASKS)
        card = PromptCard(kind, digest, "b", own, form, False, "", kind, {"metrics": {"accuracy": 0.5}})
        layer = LayerRouter(torch.rand(len(TASKS), 4))
        if kind == "milora":
            layer = LayerRouter(layer.w, torch.rand(4), torch.rand(7), torch.rand(5))
        return PromptResult(folder, write_prompt_router(folder, card, (layer,)), (), 2.0)

    monkeypatch.setattr(train, f"train_{kind}", fake)
    assert train.main(["--model", "base", "--out", str(adapters), f"--{kind}", str(out)]) == 0
    dtypes = {name.partition(".0.")[2]: tensor.dtype for name, tensor in load_file(out / CHANGE_FILE).items()}
    matrices = {"w": torch.bfloat16} if kind == "moa" else {"w_r": torch.bfloat16, "w_sa": torch.bfloat16}
    curves = {} if kind == "moa" else {"a": torch.float32, "b": torch.float32}
    assert dtypes == {**matrices, **curves}
    assert capsys.readouterr().out == f"{kind}: the task's adapter is chosen 50.0%, 2 s\n"
    assert not adapters.exists()


def test_unknown_task_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--model", "base", "--out", "x", "--only", "cooking"])
    assert "invalid choice: 'cooking'" in capsys.readouterr().err


def test_imports_no_server_parts() -> None:
    code = (
        "import sys, deploy.demo.train;"
        "print([m for m in ('typer', 'pydantic', 'fastapi', 'rich', 'peft', 'server.app') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
