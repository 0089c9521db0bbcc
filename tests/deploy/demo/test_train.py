import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from deploy.demo import train
from routing.train.adapter import AdapterResult
from routing.train.card import AdapterCard, write_card
from routing.train.data import read_task


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
