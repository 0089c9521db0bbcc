"""A token-level router's training that is cut off, or diverges: nothing good is lost, nothing wrong is continued."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from meteora_world import toy_task, write_adapter
from safetensors.torch import load_file

from routing.card_file import CHANGE_FILE
from routing.gate_folder import read_gates
from routing.train import meteora as training
from routing.train.adapter import TrainError
from routing.train.data import Task
from routing.train.meteora import train_meteora
from routing.train.meteora_recipe import MeteoraRecipe
from routing.train.router_recipe import RouterRun
from routing.train.router_training import CHECKPOINT, GateResult

RECIPE = MeteoraRecipe(steps=10, batch_size=4, learning_rate=2e-2, warmup_steps=3, max_length=80, packed=0.5, null=True)
JOINT = replace(RECIPE, joint=True)
RUN = RouterRun(progress=False, evaluation_rows=2, checkpoint_every=4, base_name="tiny", name="toy")
TASKS = [toy_task("ab", "ab"), toy_task("xyz", "xyz"), toy_task("none", "pq")]


@pytest.fixture(scope="module")
def adapters(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    write_adapter(root / "ab", chat_model, {"q_proj": 2, "down_proj": 5}, seed=1)
    write_adapter(root / "xyz", chat_model, {"down_proj": 3, "o_proj": 8}, seed=2, layers=1)
    write_adapter(root / "other", chat_model, {"down_proj": 3, "o_proj": 8}, seed=3, layers=1)
    return {name: root / name for name in ("ab", "xyz", "other")}


@pytest.fixture
def train(chat_model: Path, adapters: dict[str, Path], tmp_path: Path) -> Callable[..., GateResult]:
    def run(
        name: str, tasks: list[Task] = TASKS, recipe: MeteoraRecipe = RECIPE, run: RouterRun = RUN, xyz: str = "xyz"
    ) -> GateResult:
        own = {"ab": adapters["ab"], "xyz": adapters[xyz]}
        return train_meteora(chat_model, tasks, own, tmp_path / name, recipe, run)

    return run


def interrupted(monkeypatch: pytest.MonkeyPatch, steps: int, run: Callable[[], object]) -> None:
    calls, real = 0, training.both_losses

    def failing(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > steps:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(training, "both_losses", failing)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(training, "both_losses", real)


@pytest.mark.parametrize("recipe", [RECIPE, JOINT])
def test_a_killed_run_ends_in_the_same_bits(
    train: Callable[..., GateResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: MeteoraRecipe
) -> None:
    whole = train("whole", recipe=recipe)
    interrupted(monkeypatch, 6, lambda: train("cut", recipe=recipe))
    assert (tmp_path / "cut" / CHECKPOINT).is_file()
    resumed = train("cut", recipe=recipe)
    assert resumed.losses == whole.losses[4:]
    first, second = (load_file(tmp_path / name / CHANGE_FILE) for name in ("whole", "cut"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert resumed.card == whole.card  # with the digests of adapters that were trained, too
    assert not (tmp_path / "cut" / CHECKPOINT).exists()
    assert (whole.card.rows, whole.card.has_null, whole.card.training["null_tasks"]) == (3, True, ["none"])


OTHER_ROW = replace(TASKS[0].train[0], target="c")


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": replace(RECIPE, beta=1.0)},
        {"xyz": "other"},
        {"tasks": [replace(TASKS[0], train=(OTHER_ROW, *TASKS[0].train[1:])), *TASKS[1:]]},
        {"tasks": [TASKS[2], *TASKS[:2]]},
    ],
)
def test_a_checkpoint_of_another_run_is_not_continued(
    train: Callable[..., GateResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
) -> None:
    quick = replace(RUN, evaluation_rows=0)
    interrupted(monkeypatch, 5, lambda: train("cut", run=quick))
    assert (tmp_path / "cut" / CHECKPOINT).is_file()
    result = train("cut", run=quick, **change)
    assert len(result.losses) == RECIPE.steps
    assert "metrics" not in result.card.training


def test_a_diverging_loss_stops_the_run(train: Callable[..., GateResult], monkeypatch: pytest.MonkeyPatch) -> None:
    real = training.both_losses
    monkeypatch.setattr(
        training, "both_losses", lambda *given, **named: [loss * torch.nan for loss in real(*given, **named)]
    )
    with pytest.raises(TrainError, match="the loss is nan at step 10; lower the learning rate"):
        train("router", run=replace(RUN, checkpoint_every=50))


@pytest.mark.parametrize(("step", "every"), [(10, 50), (4, 4)])
def test_gates_that_are_not_finite_replace_no_router(
    train: Callable[..., GateResult], monkeypatch: pytest.MonkeyPatch, step: int, every: int
) -> None:
    good = train("router")
    files = {path.name: path.read_bytes() for path in good.folder.iterdir()}
    real, calls = training.both_losses, 0

    def overflowing(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        language, gate = real(*given, **named)
        if calls == step:  # the loss is a number, its gradients are not
            language.register_hook(lambda gradient: gradient * torch.inf)
        return language, gate

    monkeypatch.setattr(training, "both_losses", overflowing)
    with pytest.raises(TrainError, match=f"^the weights are not finite after step {step}; lower the learning rate$"):
        train("router", run=replace(RUN, checkpoint_every=every))
    left = {path.name: path.read_bytes() for path in good.folder.iterdir()}
    assert left == files
    assert not (good.folder / CHECKPOINT).exists()
    assert read_gates(good.folder) == good.card
