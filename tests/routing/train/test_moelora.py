"""The token-level mixture of LoRA experts is trained from scratch, and is a MeteoRA router over its experts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from meteora_world import toy_task
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters_store.peft_format import read_adapter
from adapters_store.types import TARGETS
from routing.gate_folder import load_gates, read_gates
from routing.train import moelora
from routing.train.adapter import TrainError
from routing.train.batches import encode
from routing.train.data import TaskDataError
from routing.train.gate_tally import GateTally
from routing.train.gated_linear import GateChoice, embed_adapters
from routing.train.moelora import MoeLoraRecipe, train_moelora
from routing.train.router_recipe import RouterRun
from routing.train.router_training import CHECKPOINT, GateResult
from server.model.config import ModelConfig

TASKS = [toy_task("ab", "ab"), toy_task("xyz", "xyz")]
RECIPE = MoeLoraRecipe(experts=3, rank=2, alpha=4, top_k=2, steps=10, batch_size=4, learning_rate=3e-2, warmup_steps=2)
RUN = RouterRun(progress=False, evaluation_rows=2, checkpoint_every=4, base_name="tiny", name="toy")


@pytest.fixture(scope="module")
def trained(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> GateResult:
    return train_moelora(chat_model, TASKS, tmp_path_factory.mktemp("whole") / "toy", RECIPE, RUN)


def answer_losses(causal: Any, folder: Path, task: Any) -> torch.Tensor:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    found: list[torch.Tensor] = []
    for example in encode(tokenizer, task, 80):
        with torch.no_grad():
            scores = causal(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        first = len(example.ids) - example.answer_length
        found += [-scores[at - 1, example.ids[at]] for at in range(first, len(example.ids))]
    return torch.stack(found)


def test_the_loss_falls_and_the_artefact_is_a_router_over_its_experts(trained: GateResult, chat_model: Path) -> None:
    losses = [loss for (loss,) in trained.losses]
    assert losses[-1] < 0.7 * losses[0]
    config = ModelConfig.from_folder(chat_model)
    card = read_gates(trained.folder, config.linear_shape, config.fingerprint())
    assert card == trained.card
    assert [adapter.name for adapter in card.adapters] == ["toy-0", "toy-1", "toy-2"]
    assert (card.targets, card.top_k, card.has_null, card.training["method"]) == (TARGETS, 2, False, "moelora")
    files = [read_adapter(trained.folder / "adapters" / each.name, config.linear_shape) for each in card.adapters]
    assert [file.digest for file in files] == [adapter.digest for adapter in card.adapters]
    assert [(file.rank, file.alpha, file.modules) for file in files] == [(2, 4, 14)] * 3
    causal: Any = AutoModelForCausalLM.from_pretrained(chat_model)
    weights = [file.weights for file in files]
    linears = embed_adapters(causal, weights, False, GateChoice(card.top_k, card.temperature), GateTally())
    for module, gate in load_gates(trained.folder).items():
        linears[module].gate.data.copy_(gate)
    for task in TASKS:
        expected = float(answer_losses(causal, chat_model, task.valid).mean())
        assert card.training["metrics"]["tasks"][task.name]["loss"] == pytest.approx(expected, abs=1e-3)


def test_it_begins_as_the_base_model_with_gates_that_differ(chat_model: Path, tmp_path: Path) -> None:
    still = replace(RECIPE, steps=1, learning_rate=0.0, batch_size=16)
    result = train_moelora(chat_model, TASKS, tmp_path / "toy", still, replace(RUN, evaluation_rows=0))
    causal: Any = AutoModelForCausalLM.from_pretrained(chat_model)
    every = torch.cat([answer_losses(causal, chat_model, task.train) for task in TASKS])
    assert result.losses[0][0] == pytest.approx(float(every.mean()), rel=1e-4)  # a step's 16 rows are all there are
    gates = torch.cat([gate.flatten() for gate in load_gates(result.folder).values()])
    assert gates.std().item() == pytest.approx(0.02, rel=0.1)
    first, second = (
        load_file(tmp_path / "toy" / "adapters" / name / "adapter_model.safetensors") for name in ("toy-0", "toy-1")
    )
    for name in first:
        assert first[name].any() == name.endswith("lora_A.weight")
        assert not name.endswith("lora_A.weight") or not torch.equal(first[name], second[name])


def test_a_killed_run_ends_in_the_same_bits(
    trained: GateResult, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = moelora.language_loss, 0

    def failing(*given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(moelora, "language_loss", failing)
        with pytest.raises(KeyboardInterrupt):
            train_moelora(chat_model, TASKS, tmp_path / "toy", RECIPE, RUN)
    assert (tmp_path / "toy" / CHECKPOINT).is_file()
    resumed = train_moelora(chat_model, TASKS, tmp_path / "toy", RECIPE, RUN)
    assert resumed.losses == trained.losses[4:]
    assert resumed.card == trained.card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 1}, r"^experts 1: expected 2 to 62"),
        ({"top_k": 4}, r"^top_k 4: expected 1 to 3 of 3 experts"),
        ({"rank": 0}, r"^rank 0: expected a whole number of at least 1"),
        ({"learning_rate": -1.0}, r"^learning_rate -1\.0: expected"),
        ({"gradient_clip": 0.0}, r"^gradient_clip 0\.0: expected"),
    ],
)
def test_an_impossible_recipe_is_refused(chat_model: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        train_moelora(chat_model, TASKS, tmp_path / "toy", replace(RECIPE, **change), RUN)


def test_wrong_inputs_are_named(chat_model: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"/a name: its name begins the experts', expected"):
        train_moelora(chat_model, TASKS, tmp_path / "a name", RECIPE, RUN)
    with pytest.raises(TrainError, match="task ab: comes twice"):
        train_moelora(chat_model, [TASKS[0]] * 2, tmp_path / "toy", RECIPE, RUN)
    with pytest.raises(TaskDataError, match=r"row 1: \d+ tokens, expected at most 5"):
        train_moelora(chat_model, TASKS, tmp_path / "toy", replace(RECIPE, max_length=5), RUN)
    assert not list(tmp_path.iterdir())
