"""Prompt-level routers in the evaluation: answers are those of what was chosen, and choices are counted."""

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from gates_world import NAMES, by_peft, given, make_adapter, write_tasks
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters_store.peft_format import read_adapter
from adapters_store.types import TARGETS
from routing.card_adapters import CardAdapter
from routing.evaluate.gates import main
from routing.evaluate.prompt_report import plots, routed_scores, tables
from routing.evaluate.svg import curve_chart
from routing.prompt_folder import PromptCard, write_prompt_router
from routing.prompt_router import LayerRouter, RouterForm
from routing.train.batches import encode
from routing.train.data import read_rows
from server.model.config import ModelConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def adapters(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        make_adapter(folder / name, ModelConfig.from_folder(chat_model).linear_shape, seed)
    return folder


def make_prompt_router(folder: Path, model: Path, adapters: Path, names: tuple[str, ...], **fields: Any) -> Path:
    config = ModelConfig.from_folder(model)
    generator = torch.Generator().manual_seed(4)
    form = RouterForm(num_layers=config.num_layers, pooling="mean", norm="rms", **fields)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def layer() -> LayerRouter:
        coefficients = (drawn(7), drawn(5)) if form.activation == "rational" else (None, None)
        return LayerRouter(drawn(form.num_experts, config.hidden_size), None, *coefficients)

    layers = tuple(layer() for _ in range(form.num_layers))
    rows = tuple(CardAdapter(name, read_adapter(adapters / name, config.linear_shape).digest) for name in names)
    kind = "milora" if form.experts == "modules" else "moa"
    metrics = {"accuracy": 0.75, "agreement": 0.5, "accuracy_by_layer": [0.5, 1.0], "accuracy_by_depth": [0.5, 0.75]}
    training = {"metrics": metrics}
    write_prompt_router(
        folder, PromptCard(kind, config.fingerprint(), "tiny", rows, form, False, "", "r", training), layers
    )
    return folder


@pytest.fixture(scope="module")
def out(chat_model: Path, root: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routers")
    own = folder / "milora" / "adapters"
    make_adapter(own / "mine", ModelConfig.from_folder(chat_model).linear_shape, 9)
    moa = {"experts": "adapters", "num_experts": 2, "top_k": 1, "activation": "none", "decision": "vote"}
    milora = {"experts": "modules", "num_experts": 7, "top_k": 3, "activation": "rational", "decision": "layer"}
    found = [f"moa={make_prompt_router(folder / 'moa', chat_model, adapters, NAMES, **moa)}"]
    found.append(f"mi={make_prompt_router(folder / 'milora', chat_model, own, ('mine',), **milora)}")
    found.append(f"again={folder / 'milora'}")
    arguments = ["--model", str(chat_model), "--tasks", str(root), "--adapters", str(adapters), "--device", "cpu"]
    arguments += [
        "--out",
        str(folder / "out"),
        "--merges",
        "",
        "--composite-rows",
        "0",
        "--modules",
        "1,7",
        "--perplexity",
    ]
    assert main([*arguments, *(part for each in found for part in ("--prompt-router", each)), "--batch", "8"]) == 0
    return folder / "out"


def test_answers_are_those_of_the_chosen_adapter(out: Path, chat_model: Path, adapters: Path, root: Path) -> None:
    lines = given(out, "moa")
    chosen = {line["chosen"][0][0] for line in lines}
    for line in lines:
        assert line["chosen"] == [line["chosen"][0]] * 2
        name = NAMES[line["chosen"][0][0]]
        assert line["answer"] == by_peft(chat_model, adapters, root, line["task"], name)[line["row"]]
        assert line["share"] == float(name == line["task"])
        assert 0 <= line["entropy"] <= 1
    assert chosen <= {0, 1}


def test_all_modules_are_the_plain_adapter(out: Path, chat_model: Path, root: Path) -> None:
    own = out.parent / "milora" / "adapters"
    for task in NAMES:
        answers = [line["answer"] for line in given(out, "mi, k = 7") if line["task"] == task]
        assert answers == by_peft(chat_model, own, root, task, "mine")
    for method, count in {"mi": 3, "mi, k = 1": 1, "mi, k = 7": 7}.items():
        assert all(len(layer) == count for line in given(out, method) for layer in line["chosen"])


def test_the_document_counts_the_choices(out: Path) -> None:
    document = json.loads((out / "gates.json").read_text())
    assert list(document["tasks"]) == ["oracle", "base", "moa", "mi", "mi, k = 1", "mi, k = 7", "again"]
    assert document["routed"].keys() == {"moa", "mi", "mi, k = 1", "mi, k = 7", "again"}
    assert sum(document["routed"]["mi"]["usage"]) == pytest.approx(3)
    assert document["routed"]["mi, k = 7"]["usage"] == [1.0] * 7
    assert document["prompt_routers"]["mi"]["names"] == list(TARGETS)
    assert document["prompt_routers"]["moa"]["names"] == list(NAMES)
    assert len(document["prompt_routers"]["mi"]["curves"]) == 2
    plotted = {"activation-mi.svg", "accuracy-by-layer.svg", "accuracy-by-depth.svg"}
    assert plotted <= {path.name for path in out.glob("*.svg")}
    assert "| moa | adapters | mean | none | vote | 1 | 75.0 | 50.0 |" in (out / "gates.md").read_text()


def loss_by_peft(model: Path, adapter: Path | None, root: Path, task: str, row: int) -> float:
    base, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    causal: Any = base if adapter is None else PeftModel.from_pretrained(base, adapter)
    example = encode(tokenizer, [read_rows(root / task / "test.jsonl")[row]], 128)[0]
    ids, first = torch.tensor([example.ids]), len(example.ids) - example.answer_length
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < first, -100)
    with torch.inference_mode():
        return float(causal(input_ids=ids, labels=labels).loss)


def test_targets_are_as_likely_as_in_transformers(out: Path, chat_model: Path, adapters: Path, root: Path) -> None:
    chosen = {(line["task"], line["row"]): line["chosen"][0][0] for line in given(out, "moa")}
    for method in ("base", "oracle", "moa"):
        for line in given(out, method, "loss"):
            name = {"base": None, "oracle": line["task"], "moa": NAMES[chosen[line["task"], line["row"]]]}[method]
            adapter = None if name is None else adapters / name
            expected = loss_by_peft(chat_model, adapter, root, line["task"], line["row"])
            assert line["loss"] == pytest.approx(expected, abs=1e-4)
    found = json.loads((out / "gates.json").read_text())["perplexity"]
    assert found.keys() == {"oracle", "base", "moa"}  # where layers decide by themselves there is no mix
    base = given(out, "base", "loss")
    means = [np.mean([line["loss"] for line in base if line["task"] == task]) for task in NAMES]
    assert found["base"]["perplexity"] == pytest.approx(math.exp(np.mean(means)))
    low, high = found["base"]["interval"]
    assert low <= found["base"]["perplexity"] <= high
    assert f"| base | {found['base']['perplexity']:.3f} |" in (out / "gates.md").read_text()


def test_choices_are_counted_by_hand() -> None:
    lines = [
        {"task": "a", "chosen": [[0], [1], [1]], "entropy": 0.5},
        {"task": "b", "chosen": [[1], [1], [1]], "entropy": 0.1},
    ]
    found = routed_scores({"moa": lines, "base": [{"task": "a"}]})
    assert found.keys() == {"moa"}
    assert found["moa"]["usage"] == pytest.approx([1 / 6, 5 / 6])
    assert found["moa"]["tasks"] == {"a": pytest.approx([1 / 3, 2 / 3]), "b": [0.0, 1.0]}
    assert found["moa"]["steady"] == pytest.approx(3 / 4)
    assert found["moa"]["entropy"] == pytest.approx(0.3)
    own = {"experts": "adapters", "pooling": "mean", "activation": "none", "decision": "last", "top_k": 1}
    text = "\n".join(tables({"moa": {**own, "names": ["ab", "xyz"], "metrics": {}, "curves": []}}, found))
    assert "| moa | adapters | mean | none | last | 1 |  |  |" in text
    assert "| moa | 30.0 | 75.0 | xyz 83.3, ab 16.7 |" in text
    assert tables({}, {}) == []
    assert plots({}) == {}


def test_curves_are_drawn_to_scale() -> None:
    text = curve_chart("f", (-1.0, 0.0, 1.0), {"square": (1.0, 0.0, 1.0), "steep": (-2.5, 0.0, 2.5)})
    ElementTree.fromstring(text)
    # six units from -3 to 3 over 300 pixels from 40 on: 1 is at 140, 0 at 190; -1 is at 50, 1 at 510
    assert 'd="M50.0 140.0L280.0 190.0L510.0 140.0"' in text
