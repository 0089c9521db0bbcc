"""Training a retriever on a tiny encoder: it learns, resumes in the same bits, and refuses what cannot be."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_encoder import WIDTH, make_encoder

from routing.encoder_model import EncoderModel, encoder_id
from routing.router_folder import read_router
from routing.train import retriever
from routing.train.data import Task, TaskRow
from routing.train.pairs import BOTH, INPUT
from routing.train.retriever import (
    CHECKPOINT,
    RetrieverError,
    RetrieverRecipe,
    RetrieverResult,
    RetrieverRun,
    train_retriever,
)

RECIPE = RetrieverRecipe(
    steps=60, learning_rate=3e-3, warmup_steps=5, whitening=None, forms=INPUT, rank=2, max_tokens=96, prefix="ask: "
)
QUIET = RetrieverRun(progress=False, evaluation_rows=6, prototype_samples=6, checkpoint_every=20, base_name="tiny")
WORDS = {
    "numbers": "{0} {1} {2}",
    "questions": "why {0}{1}?",
    "lists": "{0}, {1}, {2}",
    "code": "f({0}) = {1};",
    "paths": "/{0}/{1}.txt",
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    chance = np.random.default_rng(0)

    def rows(name: str, count: int) -> tuple[TaskRow, ...]:
        drawn = ["".join(chance.choice(list("abcdefghijklmnop"), 4)) for _ in range(3 * count)]
        texts = [WORDS[name].format(*drawn[3 * i : 3 * i + 3]) for i in range(count)]
        return tuple(TaskRow(name, name[0], f"Do {name}.", text, "x", 0) for text in texts)

    return [Task(name, rows(name, 20), rows(name, 8), rows(name, 3)) for name in sorted(WORDS)]


def train(encoder: Path, tasks: list[Task], out: Path, run: RetrieverRun = QUIET, **changes: object) -> RetrieverResult:
    return train_retriever(encoder, tasks, out, dataclasses.replace(RECIPE, **changes), run)


@pytest.mark.parametrize(("mode", "rate"), [("head", 0.1), ("lora", 3e-3), ("full", 3e-3)])
def test_the_loss_falls_and_the_folder_is_what_was_trained(
    encoder: Path, tasks: list[Task], tmp_path: Path, mode: str, rate: float
) -> None:
    result = train(encoder, tasks, tmp_path, mode=mode, learning_rate=rate)
    assert np.mean(result.losses[-10:]) < 0.8 * np.mean(result.losses[:5])
    card = read_router(tmp_path)
    assert (card.mode, card.base_id, card.base_name, card.width) == (
        mode,
        encoder_id(encoder, prefix="ask: "),
        "tiny",
        WIDTH,
    )
    assert card.training["tasks"] == sorted(WORDS)
    assert card.training["rows"] == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["router.json", "router.safetensors"]
    assert card.min_score == card.training["calibration"]["min_score"]
    found = card.training["metrics"][INPUT]["all"]
    assert found["queries"] == 30
    before = EncoderModel.load(encoder, prefix="ask: ")
    after = EncoderModel.load(encoder, tmp_path)
    assert np.abs(after.embed(["a b c"]) - before.embed(["a b c"])).max() > 1e-3


@pytest.mark.parametrize("mode", ["head", "lora"])
def test_an_interrupted_run_ends_in_the_same_bits(
    encoder: Path, tasks: list[Task], tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"mode": mode, "forms": "mixed", "keep": 0.1, "whitening": 0.2, "steps": 30}
    whole = train(encoder, tasks, tmp_path / "whole", **changes)
    drawn = retriever.batch_pairs

    def interrupted(*arguments: object) -> object:
        if arguments[4] == 25:
            raise KeyboardInterrupt
        return drawn(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(retriever, "batch_pairs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(encoder, tasks, tmp_path / "parts", **changes)
    assert (tmp_path / "parts" / CHECKPOINT).is_file()
    resumed = train(encoder, tasks, tmp_path / "parts", **changes)
    assert len(resumed.losses) == 10
    assert resumed.losses == whole.losses[20:]
    assert resumed.card.sha256 == whole.card.sha256


def test_a_checkpoint_of_other_rows_is_not_continued(encoder: Path, tasks: list[Task], tmp_path: Path) -> None:
    def kept(samples: int, out: Path) -> RetrieverResult:
        return train(encoder, tasks, out, samples=samples, steps=25)

    kept(5, tmp_path / "first")
    expected = kept(6, tmp_path / "expected")
    torch.manual_seed(7)
    assert kept(6, tmp_path / "first").card.sha256 == expected.card.sha256


def test_unseen_tasks_are_measured_apart_and_their_rows_not_learned(
    encoder: Path, tasks: list[Task], tmp_path: Path
) -> None:
    card = train(encoder, tasks, tmp_path / "a", share=0.4, steps=10).card
    assert len(card.training["tasks"]) == 2
    metrics = card.training["metrics"]
    assert (metrics[INPUT]["seen"]["queries"], metrics[BOTH]["unseen"]["queries"]) == (12, 18)
    unseen = [task for task in tasks if task.name not in card.training["tasks"]]
    changed = [
        dataclasses.replace(task, train=task.train[::-1])
        if task in unseen
        else dataclasses.replace(task, test=task.valid)
        for task in tasks
    ]
    assert train(encoder, changed, tmp_path / "b", share=0.4, steps=10).card.sha256 == card.sha256


def test_whitening_is_where_a_head_starts(encoder: Path, tasks: list[Task], tmp_path: Path) -> None:
    card = train(encoder, tasks, tmp_path / "a", whitening=0.1, steps=0).card
    assert card.sha256 != train(encoder, tasks, tmp_path / "b", steps=0).card.sha256
    plain = EncoderModel.load(encoder, tmp_path / "b").embed(["a b"])
    np.testing.assert_allclose(plain, EncoderModel.load(encoder, prefix="ask: ").embed(["a b"]), atol=1e-6)


def test_seeds_differ(encoder: Path, tasks: list[Task], tmp_path: Path) -> None:
    first, same, other = (
        train(encoder, tasks, tmp_path / name, seed=seed, steps=5).card.sha256
        for name, seed in zip("abc", (0, 0, 1), strict=True)
    )
    assert first == same != other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "gate"}, "mode gate: expected one of head, lora, full"),
        ({"forms": "all"}, "forms all: expected one of input"),
        ({"temperature": 0.0}, "temperature 0.0: expected a number above 0"),
        ({"whitening": 2.0}, "whitening 2.0: expected"),
        ({"share": 0.2}, "1 tasks to train on: expected at least 2"),
    ],
)
def test_an_impossible_recipe_is_refused(
    encoder: Path, tasks: list[Task], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(RetrieverError, match=message):
        train(encoder, tasks, tmp_path, **changes)


def test_a_loss_that_is_not_finite_ends_the_run(encoder: Path, tasks: list[Task], tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match="lower the learning rate"):
        train(encoder, tasks, tmp_path, mode="full", learning_rate=1e30, warmup_steps=0, gradient_clip=1e30)
