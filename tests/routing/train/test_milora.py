"""MiLoRA routers are trained: over a new adapter's linears, and over adapters that are given."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from meteora_world import toy_task, write_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters_store.peft_format import read_adapter
from adapters_store.types import TARGETS
from routing.card_file import CHANGE_FILE
from routing.prompt_folder import read_prompt_router
from routing.prompt_router import GELU_A, GELU_B
from routing.train.adapter import TrainError
from routing.train.batches import encode
from routing.train.milora import train_milora
from routing.train.prompt_recipe import MiloraRecipe
from routing.train.router_recipe import RouterRun
from routing.train.router_training import PromptResult
from server.model.config import ModelConfig

TASKS = [toy_task("ab", "ab"), toy_task("xyz", "xyz")]
RUN = RouterRun(progress=False, evaluation_rows=2, checkpoint_every=4, base_name="tiny", name="toy")
OVER = MiloraRecipe(
    experts="adapters", top_k=1, steps=20, batch_size=4, router_rate=3e-2, warmup_steps=3, max_length=80
)
NEW = MiloraRecipe(rank=4, alpha=8, steps=20, batch_size=4, adapter_rate=2e-2, router_rate=1e-2, warmup_steps=3)


@pytest.fixture(scope="module")
def adapters(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    write_adapter(root / "ab", chat_model, {"q_proj": 2, "down_proj": 5}, seed=1)
    write_adapter(root / "xyz", chat_model, {"down_proj": 3, "o_proj": 8}, seed=2, layers=1)
    return {name: root / name for name in ("ab", "xyz")}


@pytest.fixture(scope="module")
def over(chat_model: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> PromptResult:
    return train_milora(chat_model, TASKS, adapters, tmp_path_factory.mktemp("routers") / "toy", OVER, RUN)


@pytest.fixture(scope="module")
def new(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> PromptResult:
    return train_milora(chat_model, TASKS, {}, tmp_path_factory.mktemp("routers") / "toy", NEW, RUN)


def test_routers_over_adapters_learn_each_layers_choice(
    over: PromptResult, chat_model: Path, adapters: dict[str, Path]
) -> None:
    config = ModelConfig.from_folder(chat_model)
    card = read_prompt_router(over.folder, config.linear_shape, config.fingerprint())
    assert card == over.card
    assert over.losses[-1][3] < 0.2 * over.losses[0][3]
    metrics = card.training["metrics"]
    assert metrics["accuracy"] == 1.0
    assert metrics["tasks"]["ab"].keys() == {"accuracy", "loss"}
    assert (card.kind, card.form.decision, card.form.top_k, card.form.num_experts) == ("milora", "layer", 1, 2)
    assert (card.form.pooling, card.form.activation) == ("attention", "rational")
    assert [adapter.name for adapter in card.adapters] == ["ab", "xyz"]
    digests = [read_adapter(folder, config.linear_shape).digest for folder in adapters.values()]
    assert [adapter.digest for adapter in card.adapters] == digests
    assert {path.name for path in over.folder.iterdir()} == {"router.json", "router.safetensors"}


def test_over_adapters_without_labels_the_answers_and_the_balance_teach(
    chat_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    quick = replace(OVER, eta=0.0, steps=1, coefficients="fixed")
    result = train_milora(chat_model, TASKS, adapters, tmp_path, quick, replace(RUN, evaluation_rows=0))
    ((total, language, balance, _),) = result.losses
    assert total == pytest.approx(language + 0.01 * balance)
    assert balance >= 2.0 - 1e-5  # a layer's is least where all experts are equally used
    assert "metrics" not in result.card.training


def test_the_loss_falls_with_a_new_adapter(new: PromptResult) -> None:
    assert len(new.losses[0]) == 3
    assert new.losses[-1][1] < 0.7 * new.losses[0][1]
    metrics = new.card.training["metrics"]
    assert metrics["tasks"].keys() == {"ab", "xyz"}
    assert "accuracy" not in metrics
    assert sum(metrics["usage"]) == pytest.approx(3, abs=1e-3)
    assert 0 < metrics["entropy"] <= 1
    assert new.card.training["recipe"]["coefficients"] == "dev"


def test_the_new_adapter_is_an_ordinary_one(new: PromptResult, chat_model: Path) -> None:
    (adapter,) = new.card.adapters
    assert (adapter.name, new.card.form.experts) == ("toy", "modules")
    folder = new.folder / "adapters" / "toy"
    found = read_adapter(folder, ModelConfig.from_folder(chat_model).linear_shape)
    assert (found.digest, found.rank, found.alpha, found.base_model) == (adapter.digest, 4, 8, "tiny")
    assert set(found.weights.pairs) == {(layer, target) for layer in (0, 1) for target in TARGETS}
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "samples.json",
    }


def test_with_all_linears_chosen_it_is_plain_lora_in_peft(chat_model: Path, tmp_path: Path) -> None:
    recipe = replace(NEW, top_k=7, steps=8)
    result = train_milora(chat_model, TASKS, {}, tmp_path / "all", recipe, RUN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from peft import PeftModel

        causal: Any = AutoModelForCausalLM.from_pretrained(chat_model)
        model: Any = PeftModel.from_pretrained(causal, str(result.folder / "adapters" / "all"))
    tokenizer: Any = AutoTokenizer.from_pretrained(chat_model)
    for task in TASKS:
        losses: list[torch.Tensor] = []
        for example in encode(tokenizer, task.valid, 80):
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
            first = len(example.ids) - example.answer_length
            losses += [-scores[at - 1, example.ids[at]] for at in range(first, len(example.ids))]
        found = result.card.training["metrics"]["tasks"][task.name]["loss"]
        assert found == pytest.approx(float(torch.stack(losses).mean()), abs=2e-3)


def curves(result: PromptResult) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    stored = load_file(result.folder / CHANGE_FILE)
    for layer in (0, 1):
        yield stored[f"layers.{layer}.a"] - torch.tensor(GELU_A), stored[f"layers.{layer}.b"] - torch.tensor(GELU_B)


@pytest.mark.parametrize("coefficients", ["dev", "train", "fixed"])
def test_coefficients_learn_at_their_own_rate_or_not_at_all(
    chat_model: Path, adapters: dict[str, Path], tmp_path: Path, coefficients: str
) -> None:
    recipe = replace(OVER, steps=6, coefficients=coefficients, coefficients_rate=1e-3)
    result = train_milora(chat_model, TASKS, adapters, tmp_path, recipe, replace(RUN, evaluation_rows=0))
    for a, b in curves(result):
        for moved in (a, b):
            if coefficients == "fixed":
                assert not moved.any()
            else:  # Adam's steps are no longer than the rate
                assert 0 < moved.abs().max() < 6 * 1e-3


def test_as_published_the_curves_hardly_move(over: PromptResult) -> None:
    for a, b in curves(over):
        for moved in (a, b):
            assert moved.abs().max() < 21 * 1e-6


def test_rows_set_apart_teach_nothing_but_coefficients(
    chat_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    changed = [
        replace(task, train=(*task.train[:-1], replace(task.train[-1], input="qqqq", target="q"))) for task in TASKS
    ]
    recipe, run = replace(OVER, steps=4), replace(RUN, evaluation_rows=0)
    stored = []
    for place, tasks in enumerate((TASKS, changed)):
        result = train_milora(chat_model, tasks, adapters, tmp_path / str(place), recipe, run)
        stored.append(load_file(result.folder / CHANGE_FILE))
    first, second = stored
    for name in first:
        if name.endswith((".a", ".b")):
            assert not torch.equal(first[name], second[name])
        else:  # the curves differ by a few millionths
            torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)
    again = train_milora(chat_model, changed, adapters, tmp_path / "all", replace(recipe, coefficients="train"), run)
    other = load_file(again.folder / CHANGE_FILE)["layers.0.w_r"]
    assert (other - first["layers.0.w_r"]).abs().max() > 1e-3


def test_without_an_activation_there_are_no_coefficients_and_no_rows_apart(
    chat_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    recipe = replace(OVER, steps=2, activation="none", pooling="last")
    result = train_milora(chat_model, TASKS, adapters, tmp_path, recipe, replace(RUN, evaluation_rows=0))
    assert load_file(result.folder / CHANGE_FILE).keys() == {"layers.0.w_r", "layers.1.w_r"}


def test_a_single_task_may_have_a_new_adapter(chat_model: Path, tmp_path: Path) -> None:
    task = replace(TASKS[0], train=TASKS[0].train[:1])  # a single row, which both parts share
    result = train_milora(chat_model, [task], {}, tmp_path / "one", replace(NEW, steps=2), RUN)
    assert result.card.training["metrics"]["tasks"].keys() == {"ab"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 8}, r"^top_k 8: expected 1 to 7 of 7 experts"),
        ({"null": True}, r"^null True: expected none over modules"),
        ({"rank": 0}, r"^rank 0: expected a whole number of at least 1"),
        ({"balance": -1.0}, r"^balance -1\.0: expected a number of at least 0"),
        ({"coefficients": "test"}, r"^coefficients test: expected dev or train or fixed"),
        ({"coefficients_every": 0}, r"^coefficients_every 0: expected"),
        ({"coefficients_rate": float("inf")}, r"^coefficients_rate inf: expected"),
    ],
)
def test_an_impossible_recipe_is_refused(chat_model: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(TrainError, match=message):
        train_milora(chat_model, TASKS, {}, tmp_path / "out", replace(NEW, **change), RUN)
    assert not (tmp_path / "out").exists()


def test_wrong_inputs_are_named(chat_model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    def fails(message: str, tasks: Any = TASKS, own: Any = None, out: str = "out", recipe: Any = NEW) -> None:
        with pytest.raises(TrainError, match=message):
            train_milora(chat_model, tasks, own or {}, tmp_path / out, recipe, RUN)

    fails(r"^adapter ab: expected none, over modules an adapter is trained from scratch", own=adapters)
    fails(r"^task ab: comes twice", tasks=[*TASKS, TASKS[0]])
    fails(r"/no name: its name will be the adapter's, expected \[A-Za-z0-9\]", out="no name")
    fails(r"^task ab: it has no adapter", recipe=OVER)
    fails(r"^experts layers: expected modules or adapters", own=adapters, recipe=replace(OVER, experts="layers"))
    assert not list(tmp_path.iterdir())
