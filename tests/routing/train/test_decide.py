"""One training of a MoA router serves all ways to decide: what is written is what training anew would write."""

from dataclasses import replace
from pathlib import Path

import pytest
from folder_edits import edit
from meteora_world import toy_task, write_adapter

from routing.prompt_folder import load_prompt_router, read_prompt_router
from routing.prompt_router import BY_LAYER, LAST_LAYER, VOTE
from routing.train.decide import KEPT, main
from routing.train.moa import train_moa
from routing.train.prompt_recipe import MoaRecipe
from routing.train.router_recipe import RouterRun

TASKS = [toy_task("ab", "ab"), toy_task("xyz", "xyz")]
RECIPE = MoaRecipe(steps=6, batch_size=4, router_rate=1e-2, max_length=80)


@pytest.fixture(scope="module")
def adapters(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, task in enumerate(TASKS):
        write_adapter(root / task.name, chat_model, {"q_proj": 2}, seed=seed)
    return {task.name: root / task.name for task in TASKS}


def train(model: Path, adapters: dict[str, Path], out: Path, recipe: MoaRecipe) -> Path:
    run = RouterRun(progress=False, evaluation_rows=2, base_name="tiny", name=out.name)
    return train_moa(model, TASKS, adapters, out, recipe, run).folder


@pytest.mark.parametrize("decision", [LAST_LAYER, BY_LAYER])
def test_it_is_the_router_that_training_with_this_decision_makes(
    decision: str, chat_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    vote = train(chat_model, adapters, tmp_path / "vote", RECIPE)
    anew = train(chat_model, adapters, tmp_path / "anew", replace(RECIPE, decision=decision))
    out = tmp_path / decision
    assert main(["--router", str(vote), "--decision", decision, "--out", str(out)]) == 0
    found, expected = read_prompt_router(out), read_prompt_router(anew)
    assert (found.form, found.sha256, found.adapters) == (expected.form, expected.sha256, expected.adapters)
    assert found.form != read_prompt_router(vote).form
    assert found.name == decision
    assert found.training["recipe"] == expected.training["recipe"]
    metrics, own = found.training["metrics"], expected.training["metrics"]
    assert set(metrics) == {*KEPT, "accuracy"}
    assert {name: metrics[name] for name in KEPT} == {name: own[name] for name in KEPT}
    assert metrics["accuracy"] == pytest.approx(own["accuracy"], abs=1e-4)
    assert load_prompt_router(out)[1].form.decision == decision


def test_where_training_depends_on_the_decision_nothing_is_written(
    chat_model: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    joint = train(chat_model, adapters, tmp_path / "joint", replace(RECIPE, joint=True, steps=1))

    def refused(router: Path, message: str, out: Path) -> None:
        assert main(["--router", str(router), "--decision", "last", "--out", str(out)]) == 2
        assert message in capsys.readouterr().err

    out = tmp_path / "out"
    refused(joint, "expected a MoA router over adapters that were frozen", out)
    refused(tmp_path / "nowhere", "router.json: expected a readable file", out)
    assert not out.exists()
    (tmp_path / "file").touch()
    refused(joint, "file", tmp_path / "file")


def test_accuracies_are_those_of_the_layers_that_decide(
    chat_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    vote = train(chat_model, adapters, tmp_path / "vote", replace(RECIPE, steps=1))
    metrics = {"accuracy": 0.9, "agreement": 0.9, "accuracy_by_layer": [0.25, 0.75]}
    edit(vote, lambda fields: fields["training"].update(metrics=metrics))
    for decision, accuracy in ((LAST_LAYER, 0.75), (BY_LAYER, 0.5), (VOTE, None)):
        assert main(["--router", str(vote), "--decision", decision, "--out", str(tmp_path / decision)]) == 0
        found = read_prompt_router(tmp_path / decision).training["metrics"]
        assert found.get("accuracy") == accuracy
        assert "agreement" not in found
