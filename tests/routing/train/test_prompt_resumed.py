"""A prompt-level router's training that is cut off, or diverges: nothing good is lost, nothing wrong is continued."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from meteora_world import toy_task, write_adapter
from safetensors.torch import load_file

from routing.card_file import CHANGE_FILE
from routing.prompt_folder import read_prompt_router
from routing.train import milora, moa
from routing.train.adapter import TrainError
from routing.train.prompt_recipe import MiloraRecipe, MoaRecipe
from routing.train.router_recipe import RouterRun
from routing.train.router_training import CHECKPOINT, PromptResult

SHARED: dict[str, Any] = {"steps": 10, "batch_size": 3, "router_rate": 2e-2, "warmup_steps": 3, "max_length": 80}
MOA = MoaRecipe(**SHARED, joint=True)
MILORA = MiloraRecipe(**SHARED, rank=2, coefficients_rate=1e-3, coefficients_every=3)
RUN = RouterRun(progress=False, evaluation_rows=1, checkpoint_every=4, base_name="tiny", name="toy")
TASKS = [toy_task("ab", "ab"), toy_task("xyz", "xyz")]

Train = Callable[..., PromptResult]


@pytest.fixture
def train(chat_model: Path, tmp_path: Path) -> Train:
    adapters = {}
    for seed, name in enumerate(("ab", "xyz")):
        write_adapter(tmp_path / name, chat_model, {"q_proj": 2, "down_proj": 3}, seed=seed)
        adapters[name] = tmp_path / name

    def run(out: Path, recipe: MoaRecipe | MiloraRecipe, tasks: Any = TASKS, run: RouterRun = RUN) -> PromptResult:
        if isinstance(recipe, MoaRecipe):
            return moa.train_moa(chat_model, tasks, adapters, out, recipe, run)
        own = {} if recipe.experts == "modules" else adapters
        return milora.train_milora(chat_model, tasks, own, out, recipe, run)

    return run


def interrupted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, calls: int, run: Callable[[], object]) -> None:
    real, done = getattr(module, name), 0

    def failing(*given: Any, **named: Any) -> Any:
        nonlocal done
        done += 1
        if done > calls:
            raise KeyboardInterrupt
        return real(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing)
        with pytest.raises(KeyboardInterrupt):
            run()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("module", "recipe", "calls"),
    [
        (moa, MOA, 6),
        (milora, MILORA, 8),  # of these two are the coefficients'
        (milora, replace(MILORA, experts="adapters", top_k=1, coefficients="train"), 6),
    ],
)
def test_a_killed_run_ends_in_the_same_bits(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, recipe: Any, calls: int
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, out = train(tmp_path / "whole" / "toy", recipe), tmp_path / "cut" / "toy"
    name = "moa_losses" if module is moa else "milora_losses"
    interrupted(monkeypatch, module, name, calls, lambda: train(out, recipe))
    assert {path.name for path in out.iterdir()} == {CHECKPOINT}
    resumed = train(out, recipe)
    assert len(resumed.losses) == 6
    assert resumed.losses == whole.losses[4:]
    assert everything(out) == everything(whole.folder)
    assert resumed.card == whole.card


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": replace(MOA, eta=0.5)},
        {"tasks": [replace(TASKS[0], train=TASKS[0].train[1:]), TASKS[1]]},
        {"tasks": TASKS[::-1]},
    ],
)
def test_a_checkpoint_of_another_run_is_not_continued(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    quick = replace(RUN, evaluation_rows=0)
    interrupted(monkeypatch, moa, "moa_losses", 5, lambda: train(tmp_path / "toy", MOA, run=quick))
    assert (tmp_path / "toy" / CHECKPOINT).is_file()
    result = train(tmp_path / "toy", **{"recipe": MOA, "run": quick, **change})
    assert len(result.losses) == 10


def test_a_diverging_loss_stops_the_run(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = moa.moa_losses
    monkeypatch.setattr(moa, "moa_losses", lambda *given: real(*given) * torch.nan)
    with pytest.raises(TrainError, match="the loss is nan at step 10; lower the learning rate"):
        train(tmp_path / "toy", MOA, run=replace(RUN, checkpoint_every=50))


@pytest.mark.parametrize("recipe", [MILORA, replace(MILORA, experts="adapters", top_k=1)])
def test_weights_that_are_not_finite_replace_no_router(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: MiloraRecipe
) -> None:
    good = train(tmp_path / "toy", replace(recipe, steps=2))
    files = everything(good.folder)
    real, calls = milora.milora_losses, 0

    def overflowing(*given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        losses = real(*given)
        if calls == 3:  # the loss is a number, its gradients are not
            losses.register_hook(lambda gradient: gradient * torch.inf)
        return losses

    monkeypatch.setattr(milora, "milora_losses", overflowing)
    with pytest.raises(TrainError, match="the weights are not finite after step 4; lower"):
        train(tmp_path / "toy", recipe)
    assert everything(good.folder) == files
    assert read_prompt_router(good.folder) == good.card


def test_equal_seeds_give_equal_routers_and_others_do_not(train: Train, tmp_path: Path) -> None:
    quick = replace(RUN, evaluation_rows=0)
    short = replace(MILORA, steps=2)
    stored = [
        load_file(train(tmp_path / str(place) / "toy", recipe, run=quick).folder / CHANGE_FILE)
        for place, recipe in enumerate((short, short, replace(short, seed=1)))
    ]
    assert all(torch.equal(stored[0][name], stored[1][name]) for name in stored[0])
    assert not torch.equal(stored[0]["layers.0.w_r"], stored[2]["layers.0.w_r"])
