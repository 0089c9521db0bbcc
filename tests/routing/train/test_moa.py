"""MoA routers are trained: what learns, what losses and metrics are, and what cannot be trained."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from meteora_world import toy_task, write_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters_store.linear_names import module_path
from adapters_store.peft_format import read_adapter
from adapters_store.types import AdapterWeights
from routing.card_file import CHANGE_FILE, RouterFolderError
from routing.prompt_folder import load_prompt_router, read_prompt_router
from routing.prompt_router import choose
from routing.train.adapter import TrainError
from routing.train.batches import encode
from routing.train.data import Task, TaskDataError
from routing.train.mixed_batches import Mixture
from routing.train.moa import train_moa
from routing.train.prompt_recipe import MoaRecipe
from routing.train.router_recipe import RouterRun
from routing.train.router_training import PromptResult
from server.model.config import ModelConfig

RECIPE = MoaRecipe(steps=25, batch_size=4, router_rate=2e-2, warmup_steps=3, max_length=80)
RUN = RouterRun(progress=False, evaluation_rows=2, checkpoint_every=4, base_name="tiny", name="toy")
TASKS = [toy_task("ab", "ab"), toy_task("xyz", "xyz")]


@pytest.fixture(scope="module")
def weights(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, AdapterWeights]]:
    """Of mixed ranks and targets: one acts on the first layer only."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "ab": (root / "ab", write_adapter(root / "ab", chat_model, {"q_proj": 2, "down_proj": 5}, seed=1)),
        "xyz": (
            root / "xyz",
            write_adapter(root / "xyz", chat_model, {"down_proj": 3, "o_proj": 8}, seed=2, layers=1),
        ),
    }


@pytest.fixture(scope="module")
def adapters(weights: dict[str, tuple[Path, AdapterWeights]]) -> dict[str, Path]:
    return {name: folder for name, (folder, _) in weights.items()}


@pytest.fixture(scope="module")
def trained(chat_model: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> PromptResult:
    return train_moa(chat_model, TASKS, adapters, tmp_path_factory.mktemp("routers") / "toy", RECIPE, RUN)


def test_routers_learn_whose_prompts_they_see(
    trained: PromptResult, chat_model: Path, adapters: dict[str, Path]
) -> None:
    config = ModelConfig.from_folder(chat_model)
    card = read_prompt_router(trained.folder, config.linear_shape, config.fingerprint())
    assert card == trained.card
    assert trained.losses[0] == pytest.approx((0.6931, 0.6931), abs=1e-4)  # log 2: from zero, all experts are alike
    assert trained.losses[-1][0] < 0.5
    metrics = card.training["metrics"]
    assert metrics["accuracy"] == 1.0
    assert metrics["tasks"] == {"ab": {"accuracy": 1.0}, "xyz": {"accuracy": 1.0}}
    assert metrics["accuracy_by_layer"] == metrics["accuracy_by_depth"] == [1.0, 1.0]
    assert metrics["usage"] == [0.5, 0.5]
    assert (card.kind, card.base_name, card.name, card.has_null) == ("moa", "tiny", "toy", False)
    assert (card.form.experts, card.form.num_layers, card.form.num_experts) == ("adapters", 2, 2)
    digests = {name: read_adapter(folder, config.linear_shape).digest for name, folder in adapters.items()}
    assert {adapter.name: adapter.digest for adapter in card.adapters} == digests
    assert card.training["recipe"]["router_rate"] == 2e-2
    assert (card.training["tasks"], card.training["null_tasks"], card.training["rows"]) == (["ab", "xyz"], [], 16)
    assert {path.name for path in trained.folder.iterdir()} == {"router.json", "router.safetensors"}


def test_stored_routers_decide_as_they_were_judged(trained: PromptResult, chat_model: Path) -> None:
    """By hidden states of the plain base model, pooled by hand."""
    causal: Any = AutoModelForCausalLM.from_pretrained(chat_model)
    tokenizer: Any = AutoTokenizer.from_pretrained(chat_model)
    _, router = load_prompt_router(trained.folder)
    losses = []
    for label, task in enumerate(TASKS):
        for example in encode(tokenizer, task.valid, 80):
            prompt = torch.tensor([example.ids[: -example.answer_length]])
            with torch.no_grad():
                states = causal(prompt, output_hidden_states=True).hidden_states
            pooled = [(h[0] / h[0].pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()).mean(0) for h in states[:2]]
            logits = torch.stack([layer.w @ x for layer, x in zip(router.layers, pooled, strict=True)])
            assert choose(logits, router.form).chosen[:, label].all()
            losses += (-logits.log_softmax(-1)[:, label]).tolist()
    assert trained.card.training["metrics"]["class_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-3)


def test_with_frozen_adapters_their_weights_do_not_count(
    trained: PromptResult, chat_model: Path, tmp_path: Path
) -> None:
    others = {}
    for name in ("ab", "xyz"):
        write_adapter(tmp_path / name, chat_model, {"v_proj": 4}, seed=9, scale=50.0)
        others[name] = tmp_path / name
    second = train_moa(chat_model, TASKS, others, tmp_path / "out", RECIPE, RUN)
    assert second.losses == trained.losses
    first, again = (load_file(folder / CHANGE_FILE) for folder in (trained.folder, second.folder))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert second.card.adapters != trained.card.adapters


def test_answers_do_not_count(
    trained: PromptResult, chat_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    tasks = [replace(t, train=tuple(replace(row, target="other answers") for row in t.train)) for t in TASKS]
    second = train_moa(chat_model, tasks, adapters, tmp_path / "out", RECIPE, RUN)
    for found, wanted in zip(second.losses, trained.losses, strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)


def test_the_joint_loss_is_that_of_each_rows_own_adapter(
    chat_model: Path, weights: dict[str, tuple[Path, AdapterWeights]], adapters: dict[str, Path], tmp_path: Path
) -> None:
    recipe = replace(RECIPE, joint=True, eta=0.3, steps=14, null=True, smoothing=0.1, adapter_rate=1e-2)
    tasks = [TASKS[0], toy_task("plain", "pq"), TASKS[1]]
    result = train_moa(chat_model, tasks, adapters, tmp_path / "out", recipe, RUN)
    tokenizer: Any = AutoTokenizer.from_pretrained(chat_model)
    found: list[torch.Tensor] = []
    for ((task, example),) in Mixture([encode(tokenizer, task.train, 80) for task in tasks], 4, 0).samples(0):
        causal: Any = AutoModelForCausalLM.from_pretrained(chat_model)
        name = tasks[task].name
        for module, pair in weights[name][1].pairs.items() if name in weights else ():
            causal.get_submodule(module_path(*module)).weight.data += pair.scale * pair.b @ pair.a
        with torch.no_grad():
            scores = causal(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        first = len(example.ids) - example.answer_length
        found += [-scores[at - 1, example.ids[at]] for at in range(first, len(example.ids))]
    language = float(torch.stack(found).mean())
    log3 = 1.0986
    assert result.losses[0] == pytest.approx((language + 0.3 * log3, language, log3), rel=1e-3)
    languages = [step[1] for step in result.losses]
    assert sum(languages[7:]) < sum(languages[:7])


def test_routers_read_the_base_model_also_while_adapters_are_trained(
    chat_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    recipe, quick = replace(RECIPE, steps=5, gradient_clip=1e9), replace(RUN, evaluation_rows=0)
    frozen = train_moa(chat_model, TASKS, adapters, tmp_path / "frozen", recipe, quick)
    joint = train_moa(chat_model, TASKS, adapters, tmp_path / "joint", replace(recipe, joint=True), quick)
    assert [step[2] for step in joint.losses] == pytest.approx([step[1] for step in frozen.losses], rel=1e-3)


def test_joint_training_writes_new_adapters_and_leaves_the_old(
    chat_model: Path, weights: dict[str, tuple[Path, AdapterWeights]], adapters: dict[str, Path], tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for folder in adapters.values() for path in folder.iterdir()}
    recipe = replace(RECIPE, joint=True, steps=3)
    result = train_moa(chat_model, TASKS, adapters, tmp_path / "out", recipe, replace(RUN, evaluation_rows=0))
    assert {path: path.read_bytes() for path in before} == before
    assert result.card.training["recipe"]["joint"] is True
    shape = ModelConfig.from_folder(chat_model).linear_shape
    for adapter in result.card.adapters:
        own = read_adapter(tmp_path / "out" / "adapters" / adapter.name, shape)
        assert (own.digest, own.base_model) == (adapter.digest, "tiny")
        assert own.digest != read_adapter(adapters[adapter.name], shape).digest
        old = weights[adapter.name][1].pairs
        assert {module: (pair.rank, pair.scale) for module, pair in own.weights.pairs.items()} == {
            module: (pair.rank, pair.scale) for module, pair in old.items()
        }
        for module, pair in own.weights.pairs.items():
            torch.testing.assert_close(pair.a.float(), old[module].a, atol=5e-3, rtol=2e-2)  # 3 steps at 2e-4, bf16
        samples = json.loads((tmp_path / "out" / "adapters" / adapter.name / "samples.json").read_text())
        assert samples == [row.prompt for task in TASKS if task.name == adapter.name for row in task.train]


def test_tasks_without_an_adapter_teach_the_last_expert(
    chat_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    tasks = [toy_task("plain", "pq"), *TASKS]
    result = train_moa(chat_model, tasks, adapters, tmp_path, replace(RECIPE, null=True, steps=40), RUN)
    card = result.card
    assert [adapter.name for adapter in card.adapters] == ["ab", "xyz"]
    assert (card.has_null, card.form.num_experts) == (True, 3)
    assert card.training["null_tasks"] == ["plain"]
    assert card.training["metrics"]["tasks"]["plain"]["accuracy"] == 1.0
    assert card.training["metrics"]["usage"] == pytest.approx([1 / 3] * 3, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 3}, r"^top_k 3: expected 1 to 2 of 2 experts"),
        ({"pooling": "median"}, r"^pooling median: expected attention or mean or last or max"),
        ({"activation": "relu"}, r"^activation relu: expected rational or none"),
        ({"norm": "layer"}, r"^norm layer: expected rms or none"),
        ({"decision": "first"}, r"^decision first: expected layer or vote or last"),
        ({"depth": 0}, r"^depth 0: expected a whole number of at least 1"),
        ({"depth": 1, "decision": "layer"}, r"^depth 1: expected .* none where every layer decides"),
        ({"depth": 3}, r"^depth 3: expected at most 2, the layers of the model"),
        ({"eta": 0.0}, r"^eta 0\.0: expected a number above 0"),
        ({"smoothing": 1.0}, r"^smoothing 1\.0: expected"),
        ({"router_rate": float("nan")}, r"^router_rate nan: expected a number of at least 0"),
        ({"gradient_clip": 0.0}, r"^gradient_clip 0\.0: expected"),
        ({"steps": 0}, r"^steps 0: expected a whole number of at least 1"),
        ({"null": True}, r"^null: every task has an adapter"),
    ],
)
def test_an_impossible_recipe_is_refused(
    chat_model: Path, adapters: dict[str, Path], tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(TrainError, match=message):
        train_moa(chat_model, TASKS, adapters, tmp_path, replace(RECIPE, **change), RUN)
    assert not list(tmp_path.iterdir())


def test_wrong_inputs_are_named(chat_model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    def run(**named: Any) -> Callable[[], PromptResult]:
        given = {"model_folder": chat_model, "tasks": TASKS, "adapters": adapters, "recipe": RECIPE, "run": RUN}
        return lambda: train_moa(**{"out": tmp_path / "out", **given, **named})

    def fails(message: str, **named: Any) -> None:
        with pytest.raises(TrainError, match=message):
            run(**named)()

    fails("model folder", model_folder=tmp_path / "nowhere")
    fails(r"^task ab: comes twice", tasks=[*TASKS, TASKS[0]])
    fails(r"^task none: it has no adapter", tasks=[*TASKS, toy_task("none", "pq")])
    fails(r"^adapter stranger: there is no task of this name", adapters={**adapters, "stranger": tmp_path})
    fails(rf"^adapter ab, {tmp_path}: adapter_model\.safetensors is missing", adapters={**adapters, "ab": tmp_path})
    fails(r"^1 adapters, 1 tasks: expected", tasks=TASKS[:1], adapters={"ab": adapters["ab"]})
    fails(r"^device tpu: expected cpu or cuda", run=replace(RUN, device="tpu"))
    (tmp_path / "file").write_text("")
    fails(rf"^{tmp_path}/file: it is a file", out=tmp_path / "file")
    with pytest.raises(RouterFolderError, match="field name: expected a text"):
        run(run=replace(RUN, name=""))()
    with pytest.raises(TaskDataError, match=r"^split train, task ab, row 1: \d+ tokens, expected at most 5"):
        run(recipe=replace(RECIPE, max_length=5))()
    assert not (tmp_path / "out").exists()


def test_one_task_of_a_router_may_be_judged_wrong(chat_model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """Labels that contradict the prompts: metrics are not a constant."""
    crossed: list[Task] = [replace(TASKS[0], valid=TASKS[1].valid), TASKS[1]]
    result = train_moa(chat_model, crossed, adapters, tmp_path, RECIPE, RUN)
    metrics = result.card.training["metrics"]
    assert (metrics["accuracy"], metrics["usage"]) == (0.5, [0.0, 1.0])
    assert {name: own["accuracy"] for name, own in metrics["tasks"].items()} == {"ab": 0.0, "xyz": 1.0}
