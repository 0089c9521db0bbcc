"""The retrieval evaluation from task folders to tables, plots and rankings, on a tiny encoder."""

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from tiny_encoder import WIDTH, make_encoder

from routing.encoder_model import PREFIX, EncoderModel, encoder_id
from routing.evaluate.groups import chosen_groups, read_groups
from routing.evaluate.ranked import read_rankings
from routing.evaluate.routing import EvaluationPlan, Measured, Subject, evaluate_routing
from routing.evaluate.routing_report import write_report
from routing.evaluate.svg import heat_map, line_chart
from routing.router_folder import RouterCard, write_router
from routing.train.data import Task, TaskDataError, TaskRow, read_tasks, write_task

PLAN = EvaluationPlan(samples=4, rows=5, calibration_rows=3, curve=(2, 8))
GROUPS = {"core": ("digits", "letters", "marks"), "few": ("digits", "marks")}


def rows(name: str, alphabet: str, first: int, count: int) -> tuple[TaskRow, ...]:
    chance = np.random.default_rng(first)
    drawn = ["".join(chance.choice(list(alphabet), 12)) for _ in range(count)]
    return tuple(TaskRow(name, name[0], f"Do {name}.", f"{text} {first}", "x", 0) for text in drawn)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    for name, alphabet in (("digits", "0123"), ("letters", "abcd"), ("marks", "!?;:"), ("spare", "wxyz")):
        write_task(root, Task(name, *(rows(name, alphabet, i, n) for i, n in ((1, 8), (2, 3), (3, 6)))))
    (root / "manifest.json").write_text(json.dumps({"groups": {"few": GROUPS["few"], "core": GROUPS["core"]}}))
    return root


@pytest.fixture(scope="module")
def measured(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Measured]:
    folder = make_encoder(tmp_path_factory.mktemp("base"))
    head = torch.eye(WIDTH)
    card = RouterCard(encoder_id(folder), "tiny", "head", PREFIX, WIDTH, "", training={"tasks": ["digits"]})
    change = tmp_path_factory.mktemp("router") / "mine"
    write_router(change, card, {"head": head})
    subjects = [Subject("untrained", folder), Subject("mine", folder, change)]
    return evaluate_routing(subjects, read_tasks(tasks), GROUPS, PLAN, lambda *_: None)


def test_every_encoder_is_measured_in_both_forms(measured: list[Measured]) -> None:
    assert [(found.label, found.form) for found in measured] == [
        ("untrained", "input"),
        ("untrained", "instruction+input"),
        ("mine", "input"),
        ("mine", "instruction+input"),
    ]
    untrained, mine = measured[0], measured[2]
    assert set(untrained.accuracy) == {"core", "few"}
    assert untrained.accuracy["core"]["mean"]["all"]["queries"] == 15
    assert set(untrained.accuracy["core"]["mean"]) == {"all"}
    assert set(mine.accuracy["core"]["mean"]) == {"all", "seen", "unseen"}
    assert mine.accuracy["core"]["mean"]["unseen"]["queries"] == 10
    assert mine.accuracy["core"]["mean"]["all"] == untrained.accuracy["core"]["mean"]["all"], "its head changes nothing"
    assert mine.encoder != untrained.encoder
    assert set(untrained.curve["few"]) == {2, 8}
    assert untrained.calibration.related == 9
    assert math.isclose(sum(untrained.confusion[0]), 1)


def test_alphabets_are_told_apart_by_their_own_form(measured: list[Measured]) -> None:
    assert measured[0].accuracy["core"]["mean"]["all"]["top1"] > 0.9
    assert measured[0].tasks["core"]["digits"] == 1.0
    assert measured[0].crossed["core"] != measured[0].accuracy["core"]["mean"]["all"]


def test_rankings_are_those_of_the_encoder(measured: list[Measured], tasks: Path, tmp_path: Path) -> None:
    paths = write_report(tmp_path, measured, PLAN, GROUPS)
    path = tmp_path / "rankings-untrained-input.json"
    assert path in paths
    found = read_rankings(path, tasks)
    assert found.encoder == measured[0].encoder
    assert len(found.queries) == 15
    assert all({name for name, _ in query.ranked} == set(GROUPS["core"]) for query in found.queries)
    first = [query.ranked[0][0] == query.task for query in found.queries]
    assert sum(first) / 15 == pytest.approx(measured[0].accuracy["core"]["mean"]["all"]["top1"], abs=1e-4)


def test_the_report_holds_the_numbers(measured: list[Measured], tmp_path: Path) -> None:
    paths = write_report(tmp_path, measured, PLAN, GROUPS)
    page = (tmp_path / "routing.md").read_text()
    shares = measured[0].accuracy["core"]["mean"]["all"]
    shown = " / ".join(f"{100 * shares[f'top{k}']:.1f}" for k in (1, 3, 5, 8))
    assert f"| untrained | input | mean | all | 15 | {shown} |" in page
    assert f"| mine | input | {measured[2].calibration.min_score:.3f} |" in page
    tables = re.findall(r"(?:^\|.*\|\n)+", page, flags=re.M)
    assert len(tables) == 5
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)
    loaded = json.loads((tmp_path / "routing.json").read_text())
    assert loaded["results"][0]["accuracy"]["core"]["mean"]["all"] == shares
    assert loaded["groups"]["few"] == list(GROUPS["few"])
    for path in paths:
        if path.suffix == ".svg":
            ElementTree.fromstring(path.read_text())
    assert sum(path.suffix == ".svg" for path in paths) == 2 + 4


def test_the_prefix_belongs_to_the_encoder(measured: list[Measured], tmp_path: Path) -> None:
    folder = make_encoder(tmp_path)
    assert EncoderModel.load(folder, prefix="").id != EncoderModel.load(folder).id == measured[0].encoder


def test_groups_come_from_the_manifest_or_are_made(tasks: Path, tmp_path: Path) -> None:
    names = {"digits", "letters", "marks", "spare"}
    assert list(read_groups(tasks, names)) == ["core", "few"]
    assert read_groups(tasks, {"digits", "marks"}) == {"few": GROUPS["few"]}
    assert read_groups(tmp_path, names) == {"all": ("digits", "letters", "marks", "spare")}
    assert chosen_groups(tasks, names) == {"core": GROUPS["core"]}
    assert chosen_groups(tasks, names, ["few", "rest=core,-letters,spare", "again=rest,-spare"]) == {
        "few": GROUPS["few"],
        "rest": ("digits", "marks", "spare"),
        "again": ("digits", "marks"),
    }


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("none", "group none: expected name=task,task or one of all, core, few"),
        ("x=digits,nothing", "nothing: expected a task folder or one of"),
        ("x=core,-digits,-marks", "expected at least two tasks, got 1"),
    ],
)
def test_a_group_that_is_not_there_is_named(tasks: Path, group: str, message: str) -> None:
    with pytest.raises(TaskDataError, match=message):
        chosen_groups(tasks, {"digits", "letters", "marks"}, [group])


@pytest.mark.parametrize("content", ["[]", '{"groups": 3}', "{", '{"groups": {"a": 3}}'])
def test_a_manifest_of_another_form_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(TaskDataError, match="field groups: expected an object of lists of tasks"):
        read_groups(tmp_path, {"a"})


def test_plots_are_drawn_to_scale() -> None:
    page = line_chart("A & B", ["k = 1", "k = 3"], {"<x>": [0.5, 1.0]})
    path = ElementTree.fromstring(page).findall(".//{*}path[@stroke-width='2']")[0].attrib["d"]
    assert path == "M50.0 300.0L510.0 40.0"
    assert "A &amp; B" in page
    cells = ElementTree.fromstring(heat_map("C", ["a", "b"], [[1, 0], [0.25, 0.75]])).findall(".//{*}rect")[1:]
    assert [cell.attrib["fill-opacity"] for cell in cells] == ["1.000", "0.000", "0.250", "0.750"]
