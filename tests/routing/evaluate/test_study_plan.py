"""What a study does, command by command: all are understood, and none needs what is not there yet."""

import argparse
import json
import runpy
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from routing.evaluate.study_plan import Places, plan
from routing.evaluate.study_scale import MEDIUM, SCALES, Loop, Scale, Variant
from routing.evaluate.study_steps import Step, StudyError, chosen
from routing.train.data import Task, TaskRow, write_task
from routing.train.recipe_command import KINDS, _parser, _recipe_type

NAMES = ("pq", "spell", "xyz")
MORE = (*NAMES, "uvw")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    for name in MORE:
        rows = [TaskRow(name, "toy", "Say", f"{name} {i}", name[-1] * 4, 0) for i in range(8)]
        write_task(folder, Task(name, tuple(rows[:4]), tuple(rows[4:6]), tuple(rows[6:])))
    groups = {"small": list(NAMES), "medium": list(MORE)}
    (folder / "manifest.json").write_text(json.dumps({"groups": groups}))
    (folder / "composite").mkdir()
    line = {"prompt": "Both\n", "tasks": list(NAMES), "targets": ["qqqq", "llll", "zzzz"]}
    (folder / "composite" / "composite_3.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def parser_of(module: str) -> argparse.ArgumentParser:
    kind = module.removeprefix("routing.train.")
    found: argparse.ArgumentParser = (
        _parser(kind, _recipe_type(kind)) if kind in KINDS else import_module(module)._parser()
    )
    return found


@pytest.mark.parametrize("scale", sorted(SCALES))
def test_every_command_is_understood(scale: str, tasks: Path, tmp_path: Path) -> None:
    for step in plan(Places(tmp_path / "model", tasks, tmp_path / "out"), SCALES[scale]):
        asked = vars(parser_of(step.module).parse_args(step.arguments))
        assert asked["out"].is_relative_to(tmp_path / "out"), step


def paths(step: Step, root: Path) -> set[Path]:
    """What stands in its arguments below `root`."""
    return {Path(text.rpartition("=")[2]) for text in step.arguments if str(root) in text}


@pytest.mark.parametrize("scale", sorted(SCALES))
def test_a_step_needs_those_before_it_that_made_what_it_reads(scale: str, tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made: dict[Path, str] = {}
    for step in plan(Places(tmp_path / "model", tasks, out), SCALES[scale]):
        own = Path(step.arguments[step.arguments.index("--out") + 1])
        assert own not in made, f"{step.name} overwrites what {made[own]} made"
        wanted = (paths(step, out) | set(step.links.values())) - {own} - {link.parent for link in step.links}
        found = {path: [made[there] for there in made if path.is_relative_to(there)] for path in wanted}
        assert all(found.values()), f"{step.name}: {found}"
        assert step.needs == {name for names in found.values() for name in names}
        made |= dict.fromkeys([own, *(link.parent for link in step.links)], step.name)


def test_what_is_needed_by_an_evaluation(tasks: Path, tmp_path: Path) -> None:
    needs = {step.name: step.needs for step in plan(Places(tmp_path, tasks, tmp_path / "out"), SCALES["cuda"])}
    assert not needs["adapters"] | needs["milora"]
    assert needs["small"] == {"adapters"}
    assert needs["row-swapped"] == {"small", "adapters", "swapped"}
    assert needs["eval-swapped"] == {"row-swapped"}
    assert needs["adapters-medium"] == {"adapters"}
    assert needs["medium"] == {"adapters-medium"}
    assert needs["eval-medium"] == {"adapters-medium", "medium", "joint-medium"}
    assert needs["ask-plain"] == needs["ask-milora-beside"] | {"plain"} == {"adapters", "plain"}
    asked = ["beside", "k-1", "k-2", "k-4", "k-5", "k-6", "k-7", "mean", "last", "max", "gelu", "none"]
    routers = {"ask-milora", "ask-plain", "ask-moelora"}
    assert needs["eval-milora"] == {f"ask-milora-{name}" for name in asked} | routers
    assert needs["ask-longer"] == {"adapters", "longer"}
    assert needs["eval-moa"] == {"adapters", "moa", "moa-last", "moa-layer"}


def test_adapters_that_are_given_are_not_trained(tasks: Path, tmp_path: Path) -> None:
    steps = plan(Places(tmp_path / "model", tasks, tmp_path / "out", tmp_path / "given"), SCALES["cpu"])
    names = ["small", "eval-tasks", "eval-composites", "moa", "moa-last", "moa-layer", "eval-moa", "milora", "plain"]
    asked = ["beside", "", "k-1", "k-7"]
    names += [f"ask-milora-{name}".removesuffix("-") for name in asked]
    assert [step.name for step in steps] == [*names, "ask-plain", "eval-milora"]
    options = steps[0].arguments
    assert options[options.index("--adapters") + 1] == str(tmp_path / "given")


def test_chosen_steps_come_in_the_order_asked_for_each_behind_what_it_needs(tasks: Path, tmp_path: Path) -> None:
    steps = plan(Places(tmp_path, tasks, tmp_path / "out"), SCALES["cuda"])
    assert chosen(steps, ()) == steps
    names = [step.name for step in chosen(steps, ("eval-medium", "plain", "moa-last", "medium"))]
    wanted = ["adapters", "adapters-medium", "medium", "rows-medium", "joint-medium", "eval-medium"]
    assert names == [*wanted, "plain", "moa", "moa-last"]
    with pytest.raises(StudyError, match="there is no step plane, expected some of adapters, adapters-medium, rows-"):
        chosen(steps, ("plain", "plane"))


def test_a_medium_group_within_the_small_one_has_no_adapters_of_its_own(tasks: Path, tmp_path: Path) -> None:
    (tasks / "manifest.json").write_text(json.dumps({"groups": {"small": MORE, "medium": NAMES}}))
    places = Places(tmp_path, tasks, tmp_path / "out")
    needs = {step.name: step.needs for step in plan(places, SCALES["cuda"])}
    assert "adapters-medium" not in needs
    assert needs["medium"] == {"adapters"}


def tiny(scale: Scale) -> Scale:
    few = {name: Loop(2, 2) for name in ("gates", "moa", "milora")}
    variants = (
        Variant("other", "beta 0", ("--beta", "0")),
        Variant("longer", "3 steps", ("--white",), Loop(3, 2)),
        Variant("along", "along", ("--joint",)),
        Variant("medium-longer", "3 steps", loop=Loop(3, 2), group=MEDIUM),
    )
    fewer = {"curve": (2,), "new": ("xyz",), "modules": (1, 7), "variants": variants}
    return replace(scale, device="cpu", precision="float32", **few, batch=4, **fewer)


def run(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    for link, target in step.links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target.resolve(), target_is_directory=True)
    monkeypatch.setattr(sys, "argv", [step.module, *step.arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(step.module, run_name="__main__")
    assert ended.value.code == 0, step


def shorter(step: Step) -> Step:
    """With fewer steps of training where one LoRA learns all tasks."""
    more = ("--steps", "2") if step.module == "routing.train.many" else ()
    return replace(step, arguments=(*step.arguments, *more))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_whole_study_runs_on_a_tiny_model(
    chat_model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = Places(chat_model, tasks, tmp_path / "out")
    for step in plan(places, tiny(SCALES["cuda"])):
        run(shorter(step), monkeypatch)
    found: dict[str, Any] = json.loads((places.out / "eval-tasks" / "gates.json").read_text())
    assert {"oracle", "MeteoRA, top 1", "MeteoRA, top 2", "row for xyz, top 2", "2 rows a task, top 2"} <= set(
        found["tasks"]
    )
    moa = json.loads((places.out / "eval-moa" / "gates.json").read_text())
    assert {"MoA, vote", "MoA, last", "MoA, layer"} <= set(moa["tasks"])
    assert "MoA, layer" not in moa["perplexity"], "what every layer decides is no mix"
    milora = json.loads((places.out / "eval-milora" / "gates.json").read_text())
    counts = ["MiLoRA", "MiLoRA, k = 1", "MiLoRA, k = 7"]
    others = [f"MiLoRA, {name}" for name in ("mean pooling", "last pooling", "max pooling", "GeLU", "no activation")]
    assert list(milora["tasks"]) == ["oracle", "base", *counts, "plain LoRA", *others, "MoE-LoRA, top 4"]
    assert milora["tasks"]["MiLoRA"]["above"] is not None
    assert set(milora["prompt_routers"]) == {"MiLoRA", "plain LoRA", *others}
    variants = json.loads((places.out / "eval-small-variants" / "gates.json").read_text())
    tops = [f"{label}, top {k}" for label in ("MeteoRA", "beta 0", "3 steps", "along") for k in (1, 2)]
    wanted = ["oracle", "base", *tops, "oracle, adapters of along"]
    assert set(variants["tasks"]) == set(variants["perplexity"]) == set(wanted)
    medium = json.loads((places.out / "eval-medium-variants" / "gates.json").read_text())
    assert set(medium["tasks"]["oracle"]["tasks"]) == set(MORE)
    composites = json.loads((places.out / "eval-composites" / "gates.json").read_text())
    assert composites["tasks"] == {}
    assert "packed, top 2, T 30" in composites["composites"]["composite-3"]
    assert (places.out / "eval-medium" / "gates.md").is_file()
