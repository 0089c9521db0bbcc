import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from routing.train import adapter as single
from routing.train import grouped
from routing.train.adapter import AdapterRecipe, AdapterResult, AdapterRun, TrainError, train_adapter
from routing.train.batches import encode
from routing.train.data import Task, TaskRow, read_task, write_task
from routing.train.grouped import GroupedBase, Member, TimeUp, load_base, train_group

RUN = AdapterRun(progress=False, evaluation_rows=5, evaluation_batch=3)
RECIPE = AdapterRecipe(rank=3, alpha=5, learning_rate=5e-3, batch_size=4, weight_decay=0.1, gradient_clip=1.3)
RECIPES = {
    "short": replace(RECIPE, steps=6, warmup_steps=2),
    "long": replace(RECIPE, steps=9, warmup_steps=3, learning_rate=8e-3),
    "middle": replace(RECIPE, steps=8, warmup_steps=0),
}
"""Listed in no order: neither of steps nor of row lengths."""


def task(name: str, width: int, answer: str, train: int, test: int) -> Task:
    rows = [
        TaskRow(name, "c", f"Do {name}.", f"{i} " + "ab"[i % 2] * (i % width), f"{answer}{i % 3}", 0)
        for i in range(train + 1 + test)
    ]
    return Task(name, tuple(rows[:train]), tuple(rows[train : train + 1]), tuple(rows[train + 1 :]))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    write_task(root, task("short", 3, "x", train=7, test=2))
    write_task(root, task("long", 40, "longer answer ", train=13, test=6))
    write_task(root, task("middle", 12, "abc", train=30, test=4))
    return root


@pytest.fixture(scope="module")
def base(chat_model: Path) -> GroupedBase:
    return load_base(chat_model, RECIPE, "cpu")


def members(base: GroupedBase, tasks: Path, out: Path, recipes: dict[str, AdapterRecipe]) -> list[Member]:
    found = [(read_task(tasks / name), recipe) for name, recipe in recipes.items()]
    return [
        Member(task, encode(base.tokenizer, task.train, recipe.max_length), recipe, out / task.name)
        for task, recipe in found
    ]


def as_fp32(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, torch.Tensor]]:
    """What is handed over for storing, by task, before it is rounded."""
    kept: dict[str, dict[str, torch.Tensor]] = {}
    real = single.write_adapter

    def keep(folder: Path, state: dict[str, torch.Tensor], config: object, card: object, rows: object) -> None:
        kept[card.task] = {key: value.clone() for key, value in state.items()}
        real(folder, state, config, card, rows)

    monkeypatch.setattr(single, "write_adapter", keep)
    monkeypatch.setattr(grouped, "write_adapter", keep)
    monkeypatch.setattr(single, "_round_to_bf16", lambda *_: None)
    monkeypatch.setattr(grouped.GroupedLora, "round_to_bf16", lambda *_: None)
    return kept


def test_group_equals_single_runs(
    base: GroupedBase, chat_model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = as_fp32(monkeypatch)
    norms: list[torch.Tensor] = []
    clip = grouped.clip_rows

    def noted(gradients: torch.Tensor, longest: float) -> None:
        norms.append(gradients.norm(dim=1))
        clip(gradients, longest)

    monkeypatch.setattr(grouped, "clip_rows", noted)
    results = train_group(base, members(base, tasks, tmp_path / "group", RECIPES), RUN)
    together = dict(kept)
    seen = torch.stack(norms)[:6]  # of all three; both sides of the clip are met
    assert (seen > RECIPE.gradient_clip).any()
    assert (seen < RECIPE.gradient_clip).any()
    for name, recipe in RECIPES.items():
        alone = train_adapter(chat_model, tasks / name, tmp_path / "alone" / name, recipe, RUN)
        assert together[name].keys() == kept[name].keys()
        for key, expected in kept[name].items():
            assert torch.linalg.norm(together[name][key] - expected) <= 1e-4 * torch.linalg.norm(expected), key
        result = results[name]
        assert isinstance(result, AdapterResult)
        assert result.losses == pytest.approx(alone.losses, rel=1e-4)
        assert replace(result.card, final_loss=0) == replace(alone.card, final_loss=0)  # the answers shown too
        assert result.card.final_loss == pytest.approx(alone.card.final_loss, abs=2e-4)
        files = {path.name for path in result.folder.iterdir()}
        assert files == {path.name for path in alone.folder.iterdir()}
        for file in ("adapter_config.json", "samples.json"):
            assert (result.folder / file).read_text() == (alone.folder / file).read_text()


def test_what_is_stored_is_rounded_once_and_loads_in_peft(base: GroupedBase, tasks: Path, tmp_path: Path) -> None:
    recipes = {"short": replace(RECIPE, steps=2), "long": replace(RECIPE, steps=1)}
    train_group(base, members(base, tasks, tmp_path, recipes), RUN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long", "short"]
    tensors = load_file(tmp_path / "short" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {3}
    assert {tensor.shape[1] for key, tensor in tensors.items() if "lora_B" in key} == {3}
    assert json.loads((tmp_path / "short" / "card.json").read_text())["recipe"]["steps"] == 2


def test_a_member_whose_loss_is_not_finite_disturbs_no_other(
    base: GroupedBase, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = {"long": replace(RECIPE, steps=4), "short": replace(RECIPE, steps=4, learning_rate=math.inf)}
    kept = as_fp32(monkeypatch)
    results = train_group(base, members(base, tasks, tmp_path, recipes), RUN)
    together = dict(kept)
    assert "task short: the loss is nan at step 2; lower the learning rate" in str(results["short"])
    assert isinstance(results["short"], TrainError)
    assert [path.name for path in tmp_path.iterdir()] == ["long"]
    train_group(base, members(base, tasks, tmp_path, {"long": recipes["long"]}), RUN)
    for key, expected in kept["long"].items():
        torch.testing.assert_close(together["long"][key], expected, rtol=1e-4, atol=1e-6)


def test_no_folder_is_half_written(
    base: GroupedBase, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = {"short": replace(RECIPE, steps=2), "middle": replace(RECIPE, steps=1)}
    group = members(base, tasks, tmp_path, recipes)
    with pytest.raises(TimeUp, match="the time is up"):
        train_group(base, group, RUN, deadline=time.monotonic() - 1)
    assert not list(tmp_path.iterdir())

    def cut(folder: Path, *_: object) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "older").touch()
    monkeypatch.setattr(grouped, "write_adapter", cut)
    with pytest.raises(KeyboardInterrupt):
        train_group(base, group, RUN)
    assert [path.name for path in tmp_path.rglob("*")] == ["short", "older"]
    monkeypatch.undo()
    train_group(base, group, RUN)
    assert not (tmp_path / "short" / "older").exists()
    assert (tmp_path / "short" / "card.json").is_file()


def test_progress_is_said_every_twenty_steps(base: GroupedBase, tasks: Path, tmp_path: Path) -> None:
    recipes = {"short": replace(RECIPE, steps=21), "middle": replace(RECIPE, steps=3, warmup_steps=1)}
    said: list[str] = []
    train_group(base, members(base, tasks, tmp_path, recipes), RUN, said.append)
    steps = [line.split(", mean")[0] for line in said if line.startswith("step")]
    assert steps == ["step 20/21: 1 tasks", "step 21/21: 1 tasks"]


def test_recipes_of_a_group_agree(base: GroupedBase, tasks: Path, tmp_path: Path) -> None:
    recipes = {"short": RECIPE, "middle": replace(RECIPE, batch_size=5)}
    with pytest.raises(ValueError, match="expected no differences but in steps, warmup_steps and learning_rate"):
        train_group(base, members(base, tasks, tmp_path, recipes), RUN)
