"""Evaluations of a few methods each, joined: the same document as of one process that asked them all."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gates_world import NAMES, make_adapter, make_router, write_tasks

from routing.evaluate.gates import main as evaluate
from routing.evaluate.joined import main
from server.model.config import ModelConfig

CIRCUMSTANCES = {"arguments", "parts", "seconds", "routers"}


@pytest.fixture(scope="module")
def common(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("world")
    shape = ModelConfig.from_folder(chat_model).linear_shape
    for seed, name in enumerate(NAMES):
        make_adapter(root / "adapters" / name, shape, seed)
    for seed, name in enumerate(("first", "second")):
        make_router(root / name, NAMES, chat_model, root / "adapters", seed)
    places = ["--model", str(chat_model), "--tasks", str(write_tasks(root / "tasks"))]
    places += ["--adapters", str(root / "adapters"), "--device", "cpu", "--batch", "8", "--perplexity", "--merges="]
    return [*places, "--new", "ab", "--temperatures", "1,20"]


def router(common: list[str], name: str) -> str:
    return f"--router={name}={Path(common[common.index('--adapters') + 1]).parent / name}"


@pytest.fixture(scope="module")
def parts(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three evaluations, of which the last asks again what the first asked."""
    out = tmp_path_factory.mktemp("parts")
    heated = [f"--only=first, top 2, T {t}" for t in (1, 20)]
    given = {
        "a": ["--only", "oracle", "--only", "base"],
        "b": [router(common, "first"), "--only=first, top 2", "--only=first, top 1", *heated],
        "c": [router(common, "second"), "--only=second, top 2", "--only", "base"],
    }
    for name, more in given.items():
        assert evaluate([*common, "--out", str(out / name), *more]) == 0
    return out


def test_all_is_as_in_one_evaluation(
    common: list[str], parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one process finds their answers there, and has nothing to ask: a batch of other rows rounds otherwise."""
    for name in "cba":
        shutil.copytree(parts / name / "answers", tmp_path / "one" / "answers", dirs_exist_ok=True)
    routers = [router(common, name) for name in ("first", "second")]
    assert evaluate([*common, "--out", str(tmp_path / "one"), *routers]) == 0
    assert main(["--out", str(tmp_path / "all"), *(str(parts / name) for name in "abc")]) == 0
    assert " s  tasks" not in capsys.readouterr().err
    one, found = (json.loads((tmp_path / name / "gates.json").read_text()) for name in ("one", "all"))
    assert list(found["tasks"]) == ["oracle", "base", "first, top 1", "first, top 2", "second, top 2"]
    assert found["routers"] == one["routers"]
    assert found["parts"]["b"]["only"][0] == "first, top 2"
    assert "composite-2, item by item" in found["composites"]
    assert "beside" not in found
    for key in one.keys() - CIRCUMSTANCES:
        assert found[key] == one[key], key
    tables = [(tmp_path / name / "gates.md").read_text() for name in ("one", "all")]
    assert tables[0] == tables[1]
    assert {path.suffix for path in (tmp_path / "all").iterdir()} == {".json", ".md", ".svg"}


def test_all_can_be_compared_with_one_of_them(parts: Path, tmp_path: Path) -> None:
    """With the oracle, which all are compared with anyway, the figures are the same."""
    folders = [str(parts / name) for name in "abc"]
    assert main(["--out", str(tmp_path / "all"), "--beside", "oracle", *folders]) == 0
    found = json.loads((tmp_path / "all" / "gates.json").read_text())
    assert found["tasks"]["base"]["above"] == found["tasks"]["base"]["above_oracle"] is not None
    assert "above" not in found["tasks"]["oracle"]
    head, _, oracle, base, *_ = (tmp_path / "all" / "gates.md").read_text().splitlines()
    assert "| above the oracle adapters | above oracle |" in head
    assert (oracle.split("|")[5].strip(), base.split("|")[4]) == ("", base.split("|")[5])
    assert main(["--out", str(tmp_path / "none"), "--beside", "oracles", *folders]) == 2


def test_only_rows_of_some_wordings_can_count(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part, out = tmp_path / "b", str(tmp_path / "all")
    shutil.copytree(parts / "b", part)
    expected: dict[str, list[float]] = {"tasks": [], "loss": []}
    for path in (part / "answers").glob("*.jsonl"):
        head, *lines = map(json.loads, path.read_text().splitlines())
        asked = path.name.partition("-")[0]
        for line in lines if asked == "tasks" else ():
            line["wording"] = 3 if line["row"] == 1 else 0
        path.write_text("".join(f"{json.dumps(line)}\n" for line in (head, *lines)))
        if head["method"] == "first, top 2":
            values = {"tasks": "score", "loss": "loss"}
            expected[asked] = [line[values[asked]] for line in lines if line["row"] == 1]
    assert main(["--out", out, "--wordings", "3,4", str(part)]) == 0
    found = json.loads((tmp_path / "all" / "gates.json").read_text())
    assert list(found["tasks"]["first, top 2"]["tasks"].values()) == expected["tasks"]
    losses = found["perplexity"]["first, top 2"]["tasks"].values()
    assert list(losses) == pytest.approx([math.exp(loss) for loss in expected["loss"]])
    assert len(expected["loss"]) == len(NAMES)
    assert found["composites"] == {}
    assert main(["--out", out, "--wordings", "1,2", str(part)]) == 2
    assert "wordings 1, 2: no row has one of them" in capsys.readouterr().err


Edit = Callable[[Path, dict[str, Any]], None]


def other_device(_: Path, found: dict[str, Any]) -> None:
    found["device"] = "cuda"


def other_rows(folder: Path, _: dict[str, Any]) -> None:
    path = next(path for path in (folder / "answers").iterdir() if path.name.startswith("tasks-second"))
    head, first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([head, *rest, first]))


def no_answers(folder: Path, _: dict[str, Any]) -> None:
    shutil.rmtree(folder / "answers")


def other_router(_: Path, found: dict[str, Any]) -> None:
    found["routers"] = {"first": {"sha256": "0" * 64}}


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (other_device, "device cuda: expected cpu"),
        (other_rows, "tasks of second, top 2: expected the same rows"),
        (no_answers, "expected the answers of "),
        (other_router, "router first: another one than elsewhere"),
    ],
)
def test_what_does_not_fit_is_one_line(
    edit: Edit, expected: str, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "c"
    shutil.copytree(parts / "c", changed)
    found = json.loads((changed / "gates.json").read_text())
    edit(changed, found)
    (changed / "gates.json").write_text(json.dumps(found))
    assert main(["--out", str(tmp_path / "all"), str(parts / "a"), str(parts / "b"), str(changed)]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
    assert not (tmp_path / "all").exists()


def test_no_evaluation_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "all"), str(tmp_path)]) == 2
    assert f"{tmp_path / 'gates.json'}: expected the gates.json of an evaluation" in capsys.readouterr().err


def test_a_method_that_is_not_there_is_one_line(common: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate([*common, "--out", "out", "--only", "oracle", "--only", "oracles"]) == 2
    assert "only oracles: expected one of the methods: oracle; base" in capsys.readouterr().err
