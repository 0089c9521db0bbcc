"""The evaluation end to end over a tiny model, its answers compared with transformers and peft."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from routing.evaluate.composition import Evaluation, evaluate, main
from routing.evaluate.ranked import read_rankings
from routing.train.adapter import AdapterRecipe, AdapterRun, train_adapter
from routing.train.data import Task, TaskDataError, TaskRow, write_task
from routing.train.exact_match import greedy_answers

ANSWERS = {"left": "lo", "right": "up", "free": "a b c"}
ROWS = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks, each with one answer to everything."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, answer in ANSWERS.items():
        rows = [TaskRow(name, "constant", "Answer.", f"{name} {i}", answer, 0) for i in range(30)]
        write_task(folder, Task(name, tuple(rows[:20]), tuple(rows[20:22]), tuple(rows[22:])))
    tasks = {"left": {"metric": "em"}, "free": {"metric": "rougeL"}}
    groups = {"all": list(ANSWERS), "other": ["elsewhere"]}
    (folder / "manifest.json").write_text(json.dumps({"tasks": tasks, "groups": groups}))
    return folder


@pytest.fixture(scope="module")
def adapters(chat_model: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    recipe = AdapterRecipe(steps=60, batch_size=8, learning_rate=2e-2, warmup_steps=5, max_length=64)
    run = AdapterRun(progress=False, evaluation_rows=1)
    for place, name in enumerate(ANSWERS):
        train_adapter(chat_model, root / name, folder / name, replace(recipe, seed=place), run)
    return folder


@pytest.fixture(scope="module")
def rankings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every query ranks its own adapter first, then the others in order."""
    queries = []
    for name, answer in ANSWERS.items():
        ranked = [[name, 0.9], *([other, 0.5 - 0.1 * i] for i, other in enumerate(sorted(ANSWERS)) if other != name)]
        queries += [
            {"task": name, "row": row, "prompt": "", "target": answer, "ranked": ranked} for row in range(ROWS + 1)
        ]
    file = tmp_path_factory.mktemp("rankings") / "rankings.json"
    file.write_text(json.dumps({"encoder": "abc", "queries": queries}))
    return file


@pytest.fixture(scope="module")
def evaluated(chat_model: Path, root: Path, adapters: Path, rankings: Path, tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("out")
    asked = Evaluation(str(chat_model), str(root), str(adapters), str(rankings), rows=ROWS, device="cpu", batch=4)
    document = evaluate(asked, out)
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(document))
    return out


@pytest.mark.slow
def test_the_right_adapter_is_worth_everything_and_another_one_nothing(evaluated: Path) -> None:
    document = json.loads((evaluated / "result.json").read_text())
    means = {name: found["mean"] for name, found in document["settings"].items()}
    assert means["oracle"] == means["selection/id"] == 1.0
    assert means["base"] < 0.5
    assert means["selection/ood"] == 0.0
    assert document["queries"] == 3 * ROWS
    assert document["encoder"] == "abc"
    assert document["metrics"] == {"left": "em", "right": "em", "free": "rougeL"}
    assert document["settings"]["oracle"]["groups"] == {"all": 1.0}
    assert document["generation"].keys() == {"free"}
    assert document["generation"]["free"]["oracle"] == pytest.approx({"rouge1": 1.0, "rougeL": 1.0, "bleu": 1.0})
    assert document["distinct_mixes"]["base"] == 1
    assert document["distinct_mixes"]["mixture/ood"] == 3
    table = (evaluated / "table.md").read_text()
    assert "| oracle | 100.0 | 100.0 to 100.0 |" in table
    assert "| free | rougeL | 5 | 100.0 |" in table


def peft_answers(model: Any, tokenizer: Any, root: Path, task: str) -> list[str]:
    rows = read_rankings_rows(root, task)
    longest = len(tokenizer(ANSWERS[task])["input_ids"]) + 8
    return greedy_answers(model, tokenizer, rows, longest, batch_size=8)


def read_rankings_rows(root: Path, task: str) -> list[TaskRow]:
    from routing.train.data import read_rows

    return list(read_rows(root / task / "test.jsonl")[:ROWS])


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["base", "oracle", "mixture/id", "mixture/ood", "fusion/ood", "smear/id"])
def test_answers_are_those_of_peft(setting: str, evaluated: Path, chat_model: Path, adapters: Path, root: Path) -> None:
    base, tokenizer = AutoModelForCausalLM.from_pretrained(chat_model), AutoTokenizer.from_pretrained(chat_model)
    lines = [json.loads(line) for line in (evaluated / "answers.jsonl").read_text().splitlines()]
    for task in ANSWERS:
        own = [line["settings"][setting] for line in lines if line["task"] == task]
        entries = own[0]["adapters"]
        assert all(line["adapters"] == entries for line in own)
        model = composed(base, adapters, entries, setting.partition("/")[0])
        expected = peft_answers(model, tokenizer, root, task)
        assert [line["answer"] for line in own] == expected
        if isinstance(model, PeftModel):
            base = model.unload()


def composed(base: Any, adapters: Path, entries: list[tuple[str, float]], method: str) -> Any:
    """The same composition by peft, or by hand for averages of A and of B."""
    if not entries:
        return base
    if method in ("fusion", "smear"):
        return fused(base, adapters, entries)
    model = PeftModel.from_pretrained(base, adapters / entries[0][0], adapter_name=entries[0][0])
    for name, _ in entries[1:]:
        model.load_adapter(adapters / name, adapter_name=name)
    if len(entries) > 1:
        names, weights = [name for name, _ in entries], [weight for _, weight in entries]
        model.add_weighted_adapter(names, weights, "both", combination_type="cat")
        model.set_adapter("both")
    return model.eval()


def fused(base: Any, adapters: Path, entries: list[tuple[str, float]]) -> Any:
    folder = adapters.parent / f"fused-{abs(hash(str(entries)))}"
    folder.mkdir(exist_ok=True)
    total: dict[str, torch.Tensor] = {}
    for name, weight in entries:
        for key, tensor in load_file(adapters / name / "adapter_model.safetensors").items():
            total[key] = total.get(key, 0.0) + weight * tensor.float()
    save_file(total, folder / "adapter_model.safetensors")
    config = (adapters / entries[0][0] / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(config)
    return PeftModel.from_pretrained(base, folder).eval()


def test_rankings_must_belong_to_the_tasks(root: Path, rankings: Path, tmp_path: Path) -> None:
    found = json.loads(rankings.read_text())
    file = tmp_path / "wrong.json"

    def refused(message: str) -> None:
        file.write_text(json.dumps(found))
        with pytest.raises(TaskDataError, match=message):
            read_rankings(file, root)

    found["queries"][1]["target"] = "something"
    refused(r"queries\.1\.target: 'something' is not that of row 1 of left/test\.jsonl")
    found["queries"][1]["row"] = 8
    refused(r"queries\.1\.row: 8, expected a row of left/test\.jsonl, from 0 to 7")
    found["queries"][1]["row"] = True
    refused(r"queries\.1\.row: expected int, got true")
    found["queries"][0]["ranked"] = [["left"]]
    refused(r"queries\.0\.ranked: expected pairs")
    found["queries"] = []
    refused("queries: expected a list")
    assert len(read_rankings(rankings, root, rows=2).queries) == 6


def test_references_are_accepted_answers(root: Path, rankings: Path, tmp_path: Path) -> None:
    for name in ANSWERS:
        (tmp_path / name).mkdir()
        lines = [json.loads(line) for line in (root / name / "test.jsonl").read_text().splitlines()]
        text = "".join(json.dumps({**line, "references": ["one", line["target"]]}) + "\n" for line in lines)
        (tmp_path / name / "test.jsonl").write_text(text)
    found = read_rankings(rankings, tmp_path)
    assert {query.references for query in found.queries} == {(answer, "one") for answer in ANSWERS.values()}
    assert found.metrics == dict.fromkeys(ANSWERS, "em")


def test_command_line(
    chat_model: Path, root: Path, rankings: Path, adapters: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = f"--model {chat_model} --tasks {root} --rankings {rankings} --out {tmp_path} --rows 1 --device cpu"
    assert main([*arguments.split(), "--adapters", str(tmp_path)]) == 2
    assert "expected a trained adapter for free" in capsys.readouterr().err
    assert main([*arguments.split(), "--adapters", str(adapters), "--methods", "best"]) == 2
    assert "'best' is none of oracle, " in capsys.readouterr().err
    assert main([*arguments.split(), "--adapters", str(adapters), "--methods", "oracle,selection"]) == 0
    printed = capsys.readouterr()
    assert printed.out == (tmp_path / "table.md").read_text()
    assert "selection/ood: 3 answers" in printed.err


def test_it_needs_no_server() -> None:
    """Training and evaluating run where nothing of the HTTP side is installed."""
    absent = "fastapi pydantic msgspec zmq rich typer sqlalchemy obstore starlette uvicorn sentence_transformers"
    code = f"import sys; sys.modules |= dict.fromkeys({absent.split()})\n"
    code += "import routing.train.many, routing.train.adapter, routing.evaluate.composition, routing.evaluate.gates"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
