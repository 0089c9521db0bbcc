"""The whole evaluation of gates on a tiny random model: answers are what the adapters would say by themselves."""

import json
import shutil
from pathlib import Path

import pytest
from gates_world import NAMES, ROWS, by_peft, given, make_adapter, make_router, write_tasks
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters_store.types import LinearShape
from routing.evaluate.gates import main
from routing.train.data import read_rows
from routing.train.exact_match import greedy_answers
from server.model.config import ModelConfig


@pytest.fixture(scope="module")
def shape(chat_model: Path) -> LinearShape:
    return ModelConfig.from_folder(chat_model).linear_shape


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def adapters(shape: LinearShape, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate((*NAMES, "other")):
        make_adapter(folder / name, shape, seed)
    return folder


@pytest.fixture(scope="module")
def common(chat_model: Path, root: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments with two routers: of both adapters, and of one alone, which then always has weight 1."""
    out = tmp_path_factory.mktemp("routers")
    both = make_router(out / "both", NAMES, chat_model, adapters)
    alone = make_router(out / "alone", NAMES[:1], chat_model, adapters)
    found = ["--model", str(chat_model), "--tasks", str(root), "--adapters", str(adapters), "--device", "cpu"]
    return [*found, "--router", str(both), "--router", f"one={alone}", "--batch", "8"]


@pytest.fixture(scope="module")
def out(common: list[str], adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    more = ["--joint", str(adapters / "other"), "--swapped", f"xyz={adapters / 'other'}", "--new", "xyz"]
    router = common[common.index("--router") + 1]
    more += ["--curve", f"4={router}", "--merges", "cat,ties:sum:0.5", "--temperatures", "1,20"]
    assert main([*common, *more, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("base", (None, None)),
        ("oracle", ("ab", "xyz")),
        ("one LoRA for all tasks", ("other", "other")),
        ("oracle, xyz swapped", ("ab", "other")),
        ("one, top 2", ("ab", "ab")),
    ],
)
def test_answers_are_those_of_peft(
    method: str, names: tuple[str | None, ...], out: Path, chat_model: Path, adapters: Path, root: Path
) -> None:
    lines = given(out, method)
    assert [(line["task"], line["row"]) for line in lines] == [(task, row) for task in NAMES for row in range(ROWS)]
    for task, name in zip(NAMES, names, strict=True):
        own = [line["answer"] for line in lines if line["task"] == task]
        assert own == by_peft(chat_model, adapters, root, task, name)


def test_the_even_mixture_is_the_merge_by_concatenation(
    out: Path, chat_model: Path, adapters: Path, root: Path
) -> None:
    base, tokenizer = AutoModelForCausalLM.from_pretrained(chat_model), AutoTokenizer.from_pretrained(chat_model)
    model = PeftModel.from_pretrained(base, adapters / "ab", adapter_name="ab")
    model.load_adapter(adapters / "xyz", adapter_name="xyz")
    model.add_weighted_adapter(["ab", "xyz"], [0.5, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    for task in NAMES:
        own = [line["answer"] for line in given(out, "merge cat of 1/n each") if line["task"] == task]
        assert own == greedy_answers(model.eval(), tokenizer, read_rows(root / task / "test.jsonl"), 12, batch_size=8)


def test_the_document_says_what_was_asked_and_found(out: Path) -> None:
    document = json.loads((out / "gates.json").read_text())
    gated = [
        "both, top 1",
        "both, top 2",
        "one, top 2",
        "both, top 2, xyz swapped",
        "4 rows a task, top 2",
    ]
    assert set(gated) < set(document["tasks"])
    assert document["curve"] == [{"rows": 4, "method": "4 rows a task, top 2"}]
    assert document["tasks"]["4 rows a task, top 2"]["mean"] == document["tasks"]["both, top 2"]["mean"]
    assert document["new"].keys() == {"xyz"}
    assert document["routers"].keys() == {"both", "one", "4 rows a task"}
    assert {"composite-2", "composite-2, item by item"} == document["composites"].keys()
    hot = {"both, top 2, T 1", "both, top 2, T 20"}  # the router of one adapter has not what the prompt needs
    assert hot <= document["composites"]["composite-2"].keys()
    assert document["temperatures"].keys() == hot
    assert document["composites"]["composite-2, item by item"]["base"]["attempts"] >= 0
    assert (document["device"], document["dtype"]) == ("cpu", "float32")
    shares = [line["share"] for line in given(out, "both, top 1")]
    assert all(0 < share < 1 for share in shares)
    assert "share" not in given(out, "one, top 2")[-1]  # of the other task, for which there is no row
    assert {path.name for path in out.glob("*.svg")} == {"composite-2-both.svg", "composite-2-item-by-item-both.svg"}


def test_what_is_there_is_not_asked_again(common: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*common, "--merges", "", "--temperatures", "1", "--out", str(out), "--rows", str(ROWS)]) == 0
    printed = capsys.readouterr()
    said = printed.err.splitlines()
    assert said[0] == "9 methods and parts, 34 questions"
    assert len([line for line in said if line.startswith("there already: ")]) == 9
    assert len(said) == 10
    assert printed.out == (out / "gates.md").read_text()


def test_what_does_not_fit_is_one_line(
    common: list[str], adapters: Path, chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(message: str, *more: str) -> None:
        assert main([*common, "--out", str(tmp_path), *more]) == 2
        assert message in capsys.readouterr().err

    strange = make_router(tmp_path / "strange", ["other"], chat_model, adapters)
    refused("router strange: adapter other is not among the evaluated ones", "--router", str(strange))
    refused("expected a name of its own", "--router", f"one={strange}")
    refused("curve many: expected training rows a task", "--curve", f"many={strange}")
    refused("merge 'best': method is 'best'", "--merges", "best")
    refused("merge 'ties': density is None", "--merges", "ties")
    refused("no such file, expected a trained adapter for one LoRA for all tasks", "--joint", str(tmp_path))
    refused("elsewhere: expected one of the evaluated tasks, ab, xyz", "--new", "elsewhere")
    refused("composite routers: none: there is no router of this label", "--composite-routers", "none")
    refused("there is no group 'none'", "--group", "none")
    refused("rows 0: there are no composite prompts of these", "--rows", "0", "--composite-sizes", "3")
    refused("rows -1: expected a whole number of at least 0", "--rows", "-1")
    refused("batch -1: expected a whole number of at least 1", "--batch", "-1")
    refused("temperatures 0.0: expected numbers above 0", "--temperatures", "1,0")
    refused("modules 0: expected whole numbers of at least 1", "--modules", "3,0")
    refused("merge cat of 1/n each: two methods have this name", "--merges", "cat,cat")
    refused("expected a tokenizer", "--model", str(without_tokenizer(chat_model, tmp_path / "bare")))
    refused("nowhere", "--model", str(tmp_path / "nowhere"))


def test_adapters_that_were_trained_with_a_router_are_used_with_it(
    common: list[str], adapters: Path, chat_model: Path, root: Path, tmp_path: Path
) -> None:
    beside = tmp_path / "joint" / "adapters"
    shutil.copytree(adapters / "other", beside / "ab")
    router = make_router(tmp_path / "joint", ["ab"], chat_model, beside)
    more = ["--router", str(router), "--merges", "", "--composite-rows", "0", "--out", str(tmp_path / "out")]
    assert main([*common, *more]) == 0
    for task in NAMES:
        for method, own in (("joint, top 2", "other"), ("oracle, adapters of joint", {"ab": "other"}.get(task, task))):
            answers = [line["answer"] for line in given(tmp_path / "out", method) if line["task"] == task]
            assert answers == by_peft(chat_model, adapters, root, task, own)


def without_tokenizer(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        if not path.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            shutil.copy(path, folder)
    return folder


def test_a_router_of_other_weights_is_refused(
    common: list[str], adapters: Path, shape: LinearShape, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate(NAMES):
        make_adapter(tmp_path / name, shape, seed + 7)
    changed = [str(tmp_path) if argument == str(adapters) else argument for argument in common]
    assert main([*changed, "--out", str(tmp_path / "out")]) == 2
    assert f"router both: {tmp_path / 'ab'} has other weights" in capsys.readouterr().err
