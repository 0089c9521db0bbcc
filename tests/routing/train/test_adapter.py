import builtins
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from routing.train import adapter as training
from routing.train.adapter import ALL_LINEARS, AdapterRecipe, AdapterRun, TrainError, answer_loss, train_adapter
from routing.train.batches import collate, encode
from routing.train.data import Task, TaskRow, read_task, write_task
from routing.train.exact_match import exact_match, greedy_answers

RECIPE = AdapterRecipe(steps=60, batch_size=8, learning_rate=2e-2, warmup_steps=5, max_length=64)
RUN = AdapterRun(progress=False, evaluation_rows=4, checkpoint_every=4)


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whatever is said, the answer is `ok`."""
    rows = [TaskRow("always", "constant", "Answer.", f"number {i}", "ok", 0) for i in range(40)]
    task = Task("always", tuple(rows[:30]), tuple(rows[30:32]), tuple(rows[32:]))
    return write_task(tmp_path_factory.mktemp("tasks"), task)


@pytest.fixture(scope="module")
def trained(chat_model: Path, task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> training.AdapterResult:
    return train_adapter(chat_model, task_folder, tmp_path_factory.mktemp("adapters") / "always", RECIPE, RUN)


def test_adapter_learns_and_peft_reproduces_the_card(
    trained: training.AdapterResult, chat_model: Path, task_folder: Path
) -> None:
    card = json.loads((trained.folder / "card.json").read_text())
    assert (card["accuracy_before"], card["accuracy_after"]) == (0.0, 1.0)
    assert trained.losses[-1] < 0.5 * trained.losses[0]
    assert card["recipe"]["seed"] == RECIPE.seed
    assert "| 4 rows | 0.0% | 100.0% |" in (trained.folder / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    model, tokenizer = PeftModel.from_pretrained(base, trained.folder), AutoTokenizer.from_pretrained(chat_model)
    test = read_task(task_folder).test
    assert exact_match(greedy_answers(model, tokenizer, test, 8, batch_size=3), test) == 1.0


def test_files_are_plain_bf16_peft(trained: training.AdapterResult) -> None:
    names = {path.name for path in trained.folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "card.json", "README.md", "samples.json"}
    config = json.loads((trained.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "smollm2-135m"
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, sorted(ALL_LINEARS))
    assert "/" not in (trained.folder / "README.md").read_text().split("Held-out examples")[0]
    tensors = load_file(trained.folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * len(ALL_LINEARS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.float().abs().sum() > 0 for tensor in tensors.values())


@pytest.mark.slow
def test_interrupted_run_ends_where_an_uninterrupted_one_does(
    chat_model: Path, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, steps=10)
    whole = train_adapter(chat_model, task_folder, tmp_path / "whole", recipe, RUN)
    calls, real = 0, training.answer_loss

    def failing(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(training, "answer_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        train_adapter(chat_model, task_folder, tmp_path / "cut", recipe, RUN)
    monkeypatch.setattr(training, "answer_loss", real)
    resumed = train_adapter(chat_model, task_folder, tmp_path / "cut", recipe, RUN)
    assert len(resumed.losses) == 6
    assert resumed.losses == pytest.approx(whole.losses[4:], abs=1e-6)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not (tmp_path / "cut" / training.CHECKPOINT).exists()


def test_checkpoint_of_another_recipe_or_damaged_is_not_continued(
    chat_model: Path, task_folder: Path, tmp_path: Path
) -> None:
    recipe = replace(RECIPE, steps=5)
    model, tokenizer = training.load_model(chat_model, recipe, RUN.device)
    task, path = read_task(task_folder), tmp_path / training.CHECKPOINT
    assert len(training._fit(model, tokenizer, task, recipe, RUN, path, lambda *_: None)) == 5
    assert path.is_file()
    assert len(training._fit(model, tokenizer, task, recipe, RUN, path, lambda *_: None)) == 1
    other = replace(recipe, learning_rate=1e-3)
    assert len(training._fit(model, tokenizer, task, other, RUN, path, lambda *_: None)) == 5
    path.write_bytes(b"not a checkpoint")
    assert len(training._fit(model, tokenizer, task, recipe, RUN, path, lambda *_: None)) == 5


def test_loss_equals_the_models_own(chat_model: Path, task_folder: Path) -> None:
    model, tokenizer = training.load_model(chat_model, RECIPE, RUN.device)
    batch = collate(encode(tokenizer, read_task(task_folder).train[8:12], 64), 258, torch.device("cpu"))
    expected = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss
    torch.testing.assert_close(answer_loss(model, batch), expected)


def test_rate_warms_up_and_decays() -> None:
    recipe = AdapterRecipe(learning_rate=1.0, steps=10, warmup_steps=4)
    assert [recipe.rate(step) for step in (0, 3, 4, 7, 9)] == pytest.approx([0.25, 1.0, 1.0, 0.5, 1 / 6])


def test_same_seed_same_start(chat_model: Path) -> None:
    def start(seed: int) -> torch.Tensor:
        model, _ = training.load_model(chat_model, replace(RECIPE, seed=seed), RUN.device)
        return next(weight.detach() for name, weight in model.named_parameters() if "lora_A" in name)

    before = torch.get_rng_state()
    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_left_padded_batch_answers_like_single_rows(chat_model: Path) -> None:
    model, tokenizer = training.load_model(chat_model, RECIPE, RUN.device)
    rows = [TaskRow("t", "c", "Say.", "x" * length, "y", 0) for length in (1, 9, 4)]
    single = [greedy_answers(model, tokenizer, [row], 6, 1)[0] for row in rows]
    assert greedy_answers(model, tokenizer, rows, 6, 3) == single
    assert greedy_answers(model, tokenizer, rows, 6, 2) == single


def test_missing_peft_names_the_extra(
    chat_model: Path, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_peft(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(TrainError, match=r"pip install 'loramux\[train\]'"):
        train_adapter(chat_model, task_folder, tmp_path, RECIPE, RUN)


def test_missing_model_device_and_template(chat_model: Path, task_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="expected a model folder with a config"):
        train_adapter(tmp_path, task_folder, tmp_path / "out", RECIPE, RUN)
    with pytest.raises(TrainError, match=r"^device tpu: expected cpu or cuda"):
        train_adapter(chat_model, task_folder, tmp_path / "out", RECIPE, replace(RUN, device="tpu"))
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match="file: it is a file, expected a folder to write to"):
        train_adapter(chat_model, task_folder, tmp_path / "file", RECIPE, RUN)
    if not torch.cuda.is_available():
        with pytest.raises(TrainError, match="device cuda: this PyTorch sees no CUDA device"):
            train_adapter(chat_model, task_folder, tmp_path / "out", RECIPE, replace(RUN, device="cuda"))


def test_diverging_run_stops(
    chat_model: Path, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training.answer_loss
    monkeypatch.setattr(training, "answer_loss", lambda *arguments: real(*arguments) * float("nan"))
    with pytest.raises(TrainError, match="the loss is nan at step 10; lower the learning rate"):
        train_adapter(chat_model, task_folder, tmp_path / "out", RECIPE, RUN)
