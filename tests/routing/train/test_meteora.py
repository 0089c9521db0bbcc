"""Token-level routers are trained: what learns, what losses and metrics are, and what cannot be trained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from meteora_world import toy_task, write_adapter

from adapters_store.peft_format import read_adapter
from routing.card_file import RouterFolderError
from routing.gate_folder import load_gates, read_gates
from routing.train.adapter import TrainError
from routing.train.batches import encode
from routing.train.data import Task, TaskDataError
from routing.train.meteora import train_meteora
from routing.train.meteora_loss import both_losses
from routing.train.meteora_model import load_gated_model
from routing.train.meteora_recipe import MeteoraRecipe
from routing.train.mixed_batches import collate_mixed
from routing.train.router_recipe import RouterRun
from routing.train.router_training import GateResult
from server.model.config import ModelConfig

RECIPE = MeteoraRecipe(steps=25, batch_size=4, learning_rate=2e-2, warmup_steps=3, max_length=80)
RUN = RouterRun(progress=False, evaluation_rows=2, checkpoint_every=4, base_name="tiny", name="toy")
SHORT = replace(RECIPE, steps=10, packed=0.5, null=True)


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return [toy_task("ab", "ab"), toy_task("xyz", "xyz")]


@pytest.fixture(scope="module")
def adapters(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of mixed ranks and targets: one acts on the first layer only."""
    root = tmp_path_factory.mktemp("adapters")
    write_adapter(root / "ab", chat_model, {"q_proj": 2, "down_proj": 5}, seed=1)
    write_adapter(root / "xyz", chat_model, {"down_proj": 3, "o_proj": 8}, seed=2, layers=1)
    return {name: root / name for name in ("ab", "xyz")}


@pytest.fixture(scope="module")
def trained(
    chat_model: Path, tasks: list[Task], adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> GateResult:
    return train_meteora(chat_model, tasks, adapters, tmp_path_factory.mktemp("routers") / "toy", RECIPE, RUN)


def test_gates_learn_whose_tokens_they_see(trained: GateResult, chat_model: Path, adapters: dict[str, Path]) -> None:
    card, config = read_gates(trained.folder), ModelConfig.from_folder(chat_model)
    assert card == trained.card == read_gates(trained.folder, config.linear_shape, config.fingerprint())
    assert trained.losses[0][1] == pytest.approx(0.6931, abs=1e-3)  # log 2: from zero, all rows are alike
    assert trained.losses[-1][1] < 0.5 * trained.losses[0][1]
    metrics = card.training["metrics"]
    assert 0.8 < metrics["gate_accuracy"] <= 1.0
    assert 0.8 < metrics["gate_accuracy_answer"] <= 1.0
    assert metrics["tasks"].keys() == {"ab", "xyz"}
    assert (card.base_name, card.name, card.top_k, card.has_null) == ("tiny", "toy", 2, False)
    assert card.targets == ("q_proj", "o_proj", "down_proj")
    assert [adapter.name for adapter in card.adapters] == ["ab", "xyz"]
    digests = [read_adapter(folder, config.linear_shape).digest for folder in adapters.values()]
    assert [adapter.digest for adapter in card.adapters] == digests
    assert card.training["recipe"]["learning_rate"] == 2e-2
    assert (card.training["tasks"], card.training["null_tasks"], card.training["rows"]) == (["ab", "xyz"], [], 16)
    assert all(gate.abs().sum() > 0 for gate in load_gates(trained.folder).values())
    assert {path.name for path in trained.folder.iterdir()} == {"router.json", "router.safetensors"}


@pytest.mark.parametrize(("evaluation_batch", "white"), [(1, False), (20, False), (20, True)])
def test_metrics_are_those_of_the_gates_as_stored(
    chat_model: Path, tasks: list[Task], adapters: dict[str, Path], tmp_path: Path, evaluation_batch: int, white: bool
) -> None:
    recipe = replace(RECIPE, steps=6, smoothing=0.3, white=white)
    run = replace(RUN, evaluation_batch=evaluation_batch)
    tasks = [replace(task, valid=(task.valid[0], replace(task.test[1], target="letters"))) for task in tasks]
    trained = train_meteora(chat_model, tasks, adapters, tmp_path / "router", recipe, run)
    model = load_gated_model(chat_model, tasks, adapters, RECIPE, "cpu")
    seen: dict[Any, torch.Tensor] = {}
    for module, gate in load_gates(trained.folder).items():
        model.linears[module].gate.data.copy_(gate)
        model.linears[module].register_forward_pre_hook(
            lambda _linear, inputs, module=module: seen.update({module: inputs[0].detach()})
        )
    rows = [encode(model.tokenizer, task.valid, 80) for task in tasks]
    assert len({example.answer_length for example in rows[0]}) == 2  # a mean over batches would be another
    columns = zip(*(example.ids for own in rows for example in own), strict=False)
    shared = next(place for place, column in enumerate(columns) if len(set(column)) > 1)
    assert trained.card.training["metrics"]["shared_tokens"] == shared > 0
    for place, task in enumerate(tasks):
        right, answers, apart, losses, gate_losses = [], [], [], [], []
        for example in rows[place]:
            logits = model.causal(input_ids=torch.tensor([example.ids])).logits[0].detach()
            first = len(example.ids) - example.answer_length
            losses += [-logits[at - 1].log_softmax(-1)[example.ids[at]] for at in range(first, len(example.ids))]
            for module, x in seen.items():
                scores = x[0] @ model.linears[module].gate.detach().T
                gate_losses += (-scores.log_softmax(-1)[:, place]).tolist()
                found = scores.argmax(-1) == place
                right += found.tolist()
                apart += found[shared:].tolist()
                answers += found[first - 1 : -1].tolist()
        metrics = trained.card.training["metrics"]["tasks"][task.name]
        assert metrics["gate_accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-3)
        assert metrics["gate_accuracy_answer"] == pytest.approx(sum(answers) / len(answers), abs=1e-3)
        assert metrics["gate_accuracy_apart"] == pytest.approx(sum(apart) / len(apart), abs=1e-3)
        assert metrics["gate_loss"] == pytest.approx(sum(gate_losses) / len(gate_losses), abs=1e-3)
        assert metrics["loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-3)


@pytest.mark.parametrize(("positions", "prompts_count"), [("all", False), ("answer", False), ("all", True)])
def test_losses_equal_a_plain_computation(
    chat_model: Path, tasks: list[Task], adapters: dict[str, Path], positions: str, prompts_count: bool
) -> None:
    model = load_gated_model(chat_model, [*tasks, toy_task("none", "pq")], adapters, SHORT, "cpu")
    inputs: list[torch.Tensor] = []
    for linear in model.linears.values():
        torch.nn.init.normal_(linear.gate, std=0.5)
        linear.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    ab, xyz, none = (encode(model.tokenizer, toy_task(name, name).train, 80) for name in ("ab", "xyz", "none"))
    samples = [((0, ab[0]), (2, none[1])), ((1, xyz[3]),)]
    batch = collate_mixed(samples, model.tokenizer.pad_token_id, torch.device("cpu"), prompts_count=prompts_count)
    language, gate = both_losses(model, batch, positions)
    logits = model.causal(input_ids=batch.ids, attention_mask=batch.mask).logits
    of_language, of_gates = [], []
    for row, sample in enumerate(samples):
        start = 0
        for label, example in sample:
            stop = start + len(example.ids)
            answer = stop - example.answer_length
            for at in range(start + 1 if prompts_count else answer, stop):
                of_language.append(-logits[row, at - 1].log_softmax(-1)[example.ids[at - start]])
            for at in range(start, stop) if positions == "all" else range(answer - 1, stop - 1):
                for x, linear in zip(inputs, model.linears.values(), strict=False):
                    of_gates.append(-(linear.gate @ x[row, at]).log_softmax(-1)[label])
            start = stop
    torch.testing.assert_close(language, torch.stack(of_language).mean())
    torch.testing.assert_close(gate, torch.stack(of_gates).mean())


def test_labels_are_the_rows_of_the_tasks_adapters(
    chat_model: Path, tasks: list[Task], adapters: dict[str, Path]
) -> None:
    three = [toy_task("none", "pq"), *tasks]
    first = load_gated_model(chat_model, three, adapters, SHORT, "cpu")
    assert first.labels == (2, 0, 1)
    assert [adapter.name for adapter in first.adapters] == ["ab", "xyz"]
    turned = load_gated_model(chat_model, [three[2], three[0], three[1]], adapters, SHORT, "cpu")
    assert turned.labels == (0, 2, 1)
    assert [adapter.name for adapter in turned.adapters] == ["xyz", "ab"]
    assert turned.linears[1, "o_proj"].experts.owners.shape == (3, 0)
    assert turned.linears[0, "o_proj"].experts.owners.bool().any(-1).tolist() == [True, False, False]


def test_only_gates_get_gradients_and_adapters_stay(
    chat_model: Path, tasks: list[Task], adapters: dict[str, Path]
) -> None:
    model = load_gated_model(chat_model, tasks, adapters, RECIPE, "cpu")
    frozen = {name: tensor.clone() for name, tensor in model.causal.state_dict().items() if not name.endswith(".gate")}
    factors = {name: tensor.clone() for name, tensor in model.causal.named_buffers()}
    assert sum(name.endswith((".a", ".b")) for name in frozen) == 12
    examples = encode(model.tokenizer, tasks[0].train, 80)
    batch = collate_mixed([((0, example),) for example in examples], 258, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.causal.parameters(), lr=0.1)
    for _ in range(2):
        torch.autograd.backward(sum(both_losses(model, batch, "all")))
        optimizer.step()
    assert {name for name, weight in model.causal.named_parameters() if weight.grad is not None} == set(model.gates)
    assert all(float(gate.grad.abs().sum()) > 0 for gate in model.gates.values())
    state = {**model.causal.state_dict(), **dict(model.causal.named_buffers())}
    assert all(torch.equal(state[name], tensor) for name, tensor in {**frozen, **factors}.items())
    digests = [
        read_adapter(folder, ModelConfig.from_folder(chat_model).linear_shape).digest for folder in adapters.values()
    ]
    assert [adapter.digest for adapter in model.adapters] == digests


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 3}, r"^top_k 3: expected 1 to 2 of 2 experts"),
        ({"temperature": 0.0}, r"^temperature 0\.0: expected a number above 0"),
        ({"beta": float("nan")}, r"^beta nan: expected a number of at least 0"),
        ({"beta": 0.0, "top_k": 1}, r"^beta 0\.0: expected a number of at least 0, and above it with top_k 1"),
        ({"smoothing": 1.0}, r"^smoothing 1\.0: expected"),
        ({"gate_positions": "prompt"}, r"^gate_positions prompt: expected all or answer"),
        ({"packed": 1.5}, r"^packed 1\.5: expected a share"),
        ({"steps": 0}, r"^steps 0: expected a whole number of at least 1"),
        ({"null": True}, r"^null: every task has an adapter"),
    ],
)
def test_an_impossible_recipe_is_refused(
    chat_model: Path, tasks: list[Task], adapters: dict[str, Path], tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(TrainError, match=message):
        train_meteora(chat_model, tasks, adapters, tmp_path, replace(RECIPE, **change), RUN)


def test_wrong_inputs_are_named(chat_model: Path, tasks: list[Task], adapters: dict[str, Path], tmp_path: Path) -> None:
    def fails(message: str, *, model: Path = chat_model, tasks: list[Task] = tasks, **found: Path) -> None:
        with pytest.raises(TrainError, match=message):
            train_meteora(model, tasks, {**adapters, **found}, tmp_path / "out", RECIPE, RUN)

    fails("model folder", model=tmp_path / "nowhere")
    fails(r"^task ab: comes twice", tasks=[*tasks, tasks[0]])
    fails(r"^task none: it has no adapter", tasks=[*tasks, toy_task("none", "pq")])
    fails(r"^adapter stranger: there is no task of this name", stranger=tmp_path)
    fails(rf"^adapter ab, {tmp_path}: adapter_model\.safetensors is missing", ab=tmp_path)
    with pytest.raises(TrainError, match=r"^1 adapters, 1 tasks: expected"):
        train_meteora(chat_model, tasks[:1], {"ab": adapters["ab"]}, tmp_path / "out", RECIPE, RUN)
    with pytest.raises(RouterFolderError, match="field name: expected a text"):
        train_meteora(chat_model, tasks, adapters, tmp_path / "out", RECIPE, replace(RUN, name=""))
    with pytest.raises(TaskDataError, match=r"^split train, task ab, row 1: \d+ tokens, expected at most 5"):
        train_meteora(chat_model, tasks, adapters, tmp_path / "out", replace(RECIPE, max_length=5), RUN)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TrainError, match=rf"^{tmp_path}/file: it is a file, expected a folder to write to"):
            train_meteora(chat_model, tasks, adapters, out, RECIPE, RUN)
    for device in ("tpu", "mps", "cuda:x"):
        with pytest.raises(TrainError, match=f"^device {device}: expected cpu or cuda"):
            train_meteora(chat_model, tasks, adapters, tmp_path / "out", RECIPE, replace(RUN, device=device))
    if not torch.cuda.is_available():
        with pytest.raises(TrainError, match="device cuda: this PyTorch sees no CUDA device"):
            train_meteora(chat_model, tasks, adapters, tmp_path / "out", RECIPE, replace(RUN, device="cuda"))


@pytest.mark.parametrize(
    ("kept", "message"), [("config.json", "expected a tokenizer that"), ("*.json*", "expected weights in safetensors")]
)
def test_a_model_folder_without_tokenizer_or_weights_is_refused(
    chat_model: Path, tasks: list[Task], adapters: dict[str, Path], tmp_path: Path, kept: str, message: str
) -> None:
    for path in chat_model.glob(kept):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(TrainError, match=rf"^{tmp_path}: {message}.*\)$"):
        train_meteora(tmp_path, tasks, adapters, tmp_path / "out", RECIPE, RUN)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_and_a_model_without_template_are_refused(
    chat_model: Path, tasks: list[Task], adapters: dict[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "other", tiny_model, {"q_proj": 2}, seed=1)
    with pytest.raises(TrainError, match=r"^adapter xyz, .*no layer fits the served model"):
        train_meteora(chat_model, tasks, {**adapters, "xyz": tmp_path / "other"}, tmp_path / "out", RECIPE, RUN)
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in chat_model.iterdir():
        if path.suffix != ".jinja":
            (bare / path.name).write_bytes(path.read_bytes())
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TrainError, match="expected a tokenizer with a chat template"):
        train_meteora(bare, tasks, adapters, tmp_path / "out", RECIPE, RUN)


def test_rate_warms_up_and_decays_by_a_cosine() -> None:
    recipe = MeteoraRecipe(steps=12, warmup_steps=4)
    assert [recipe.share(step) for step in (0, 3, 4, 8, 12)] == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.0])
