"""An adapter joins a trained router: one more row, fitted to what the linears see under each task's own adapter."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from meteora_world import toy_task, write_adapter
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters_store.linear_names import Module, module_path
from adapters_store.peft_format import read_adapter
from routing.card_adapters import CardAdapter
from routing.gate_folder import GateCard, load_gates, read_gates, write_gates
from routing.train.adapter import TrainError
from routing.train.batches import encode
from routing.train.data import write_task
from routing.train.extend import extend_router, main
from routing.train.joined_row import ExtendRecipe
from routing.train.row_fit import RowFit
from server.model.config import ModelConfig

TASKS = [toy_task("ab", "ab"), toy_task("new", "mno"), toy_task("plain", "pq"), toy_task("xyz", "xyz")]
TARGETS = ("q_proj", "v_proj", "down_proj")
RECIPE = ExtendRecipe(samples=4, others=3, evaluation_rows=2, rounds=1)


@pytest.fixture(scope="module")
def adapters(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("ab", "new", "xyz")):
        write_adapter(root / name, chat_model, dict.fromkeys(TARGETS, 2), seed=seed)
    return {name: root / name for name in ("ab", "new", "xyz")}


def make_router(
    folder: Path, model: Path, adapters: Mapping[str, Path], names: tuple[str, ...], null: bool = False
) -> GateCard:
    config = ModelConfig.from_folder(model)
    shape = config.linear_shape
    generator = torch.Generator().manual_seed(5)
    gates = {
        (layer, target): 0.3 * torch.randn(len(names) + null, shape.inputs[target], generator=generator)
        for layer in range(2)
        for target in TARGETS
    }
    rows = tuple(CardAdapter(name, read_adapter(adapters[name], shape).digest) for name in names)
    card = GateCard(config.fingerprint(), "tiny", rows, TARGETS, min(2, len(rows)), 1.5, null, "", "gates", {"seen": 1})
    return write_gates(folder, card, gates)


class Seen:
    """What the linears of `transformers` + `peft` are given, sequence by sequence, in fp32."""

    def __init__(self, model: Path, adapter: Path | None) -> None:
        base = AutoModelForCausalLM.from_pretrained(model)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.causal: Any = base if adapter is None else PeftModel.from_pretrained(base, adapter).base_model.model
        self.inputs: dict[Module, list[Tensor]] = {}
        for layer in range(2):
            for target in TARGETS:
                linear = self.causal.get_submodule(module_path(layer, target))
                linear.register_forward_pre_hook(self._keep((layer, target)))

    def _keep(self, module: Module) -> Any:
        return lambda _, inputs: self.inputs.setdefault(module, []).append(inputs[0][0])

    def run(self, rows: Any) -> dict[Module, Tensor]:
        with torch.no_grad():
            for example in encode(self.tokenizer, rows, 128):
                self.causal(input_ids=torch.tensor([example.ids]))
        return {module: torch.cat(parts) for module, parts in self.inputs.items()}


class Routed(Seen):
    """The base model, in which gates weigh the adapters of `names` for every token; rows without one add nothing."""

    def __init__(self, model: Path, gates: Mapping[Module, Tensor], names: tuple[str, ...], root: Path) -> None:
        super().__init__(model, None)
        shape = ModelConfig.from_folder(model).linear_shape
        pairs = [read_adapter(root / name, shape).weights.pairs for name in names]
        for module, gate in gates.items():
            own = [each[module] for each in pairs]
            self.causal.get_submodule(module_path(*module)).register_forward_hook(self._routes(gate, own))

    def _routes(self, gate: Tensor, pairs: list[Any]) -> Any:
        def hook(_: Any, inputs: Any, y: Tensor) -> Tensor:
            values, rows = (inputs[0] @ gate.T).topk(2, dim=-1)
            shares = torch.exp(values / 1.5) / torch.exp(values / 1.5).sum(-1, keepdim=True)
            for row, pair in enumerate(pairs):
                share = torch.where(rows == row, shares, 0.0).sum(-1, keepdim=True)
                y = y + share * pair.scale * (inputs[0] @ pair.a.T @ pair.b.T)
            return y

        return hook


def fitted(old: Tensor, seen: list[Mapping[str, Tensor]], labels: Mapping[str, int]) -> Tensor:
    fit = RowFit(old[None])
    for inputs in seen:
        fit.add(inputs["new"], None)
        for name, label in labels.items():
            fit.add(inputs[name], label)
    return fit.rows(RECIPE.ridge)[0]


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("rounds", [0, 2])
def test_the_row_is_fitted_to_what_the_linears_see(
    rounds: int, null: bool, chat_model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    before = make_router(tmp_path / "old", chat_model, adapters, ("xyz", "ab"), null)
    recipe = replace(RECIPE, rounds=rounds)
    result = extend_router(tmp_path / "old", "new", chat_model, TASKS, adapters, tmp_path / "wide", recipe)
    old, wide = load_gates(tmp_path / "old"), load_gates(tmp_path / "wide")
    labels = {"xyz": 0, "ab": 1} | ({"plain": 2} if null else {})
    rows = {task.name: task.train[: 4 if task.name == "new" else 3] for task in TASKS}
    root = adapters["ab"].parent
    seen = [{name: Seen(chat_model, adapters.get(name)).run(own) for name, own in rows.items()}]
    for _ in range(rounds + 1):
        by_module = {m: [{n: found[m] for n, found in turn.items()} for turn in seen] for m in wide}
        expected = {m: torch.cat([old[m][:2], fitted(old[m], by_module[m], labels)[None], old[m][2:]]) for m in wide}
        names = ("xyz", "ab", "new")
        seen.append({name: Routed(chat_model, expected, names, root).run(own) for name, own in rows.items()})
    for module, gate in wide.items():
        torch.testing.assert_close(gate, expected[module], rtol=5e-3, atol=5e-3)
        torch.testing.assert_close(torch.cat([gate[:2], gate[3:]]), old[module], rtol=0, atol=0)
    card = read_gates(tmp_path / "wide")
    assert card == result.card
    assert [adapter.name for adapter in card.adapters] == ["xyz", "ab", "new"]
    assert card.adapters[:2] == before.adapters
    assert (card.has_null, card.top_k, card.temperature, card.name) == (null, 2, 1.5, "gates")
    assert card.training["seen"] == 1
    [added] = card.training["added"]
    fields = {"name": "new", "samples": 4, "others": 3, "ridge": 0.1, "rounds": rounds}
    assert {key: added[key] for key in fields} == fields
    assert set(added["metrics"]) == {f"{w}{a}" for w in ("new", "others", "others_before") for a in ("", "_answer")}
    places = {**labels, "new": 2} | ({"plain": 3} if null else {})
    held_out = {
        task.name: Routed(chat_model, wide, ("xyz", "ab", "new"), root).run(task.valid[:2])
        for task in TASKS
        if task.name in places
    }

    def right(gates: Mapping[Module, Tensor], places: Mapping[str, int]) -> float:
        hits = [
            (held_out[name][module] @ gate.T).argmax(1) == place
            for name, place in places.items()
            for module, gate in gates.items()
        ]
        return float(torch.cat(hits).float().mean())

    others = {name: place for name, place in places.items() if name != "new"}
    shares = {"new": right(wide, {"new": 2}), "others": right(wide, others), "others_before": right(old, labels)}
    assert {what: added["metrics"][what] for what in shares} == pytest.approx(shares, abs=2e-3)


def test_a_row_is_fitted_anew_for_other_weights(chat_model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    make_router(tmp_path / "old", chat_model, adapters, ("new", "ab", "xyz"))
    write_adapter(tmp_path / "other", chat_model, dict.fromkeys(TARGETS, 3), seed=8)
    changed = {**adapters, "new": tmp_path / "other"}
    result = extend_router(tmp_path / "old", "new", chat_model, TASKS, changed, tmp_path / "same", RECIPE)
    shape = ModelConfig.from_folder(chat_model).linear_shape
    assert [adapter.name for adapter in result.card.adapters] == ["new", "ab", "xyz"]
    assert result.card.adapters[0].digest == read_adapter(tmp_path / "other", shape).digest
    make_router(tmp_path / "without", chat_model, adapters, ("ab", "xyz"))
    old, same = load_gates(tmp_path / "old"), load_gates(tmp_path / "same")
    for module, gate in same.items():
        assert gate.shape == old[module].shape
        assert torch.equal(gate[1:], old[module][1:])
        assert not torch.equal(gate[0], old[module][0])


def test_what_does_not_fit_is_refused(chat_model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    make_router(tmp_path / "old", chat_model, adapters, ("xyz", "ab"))
    make_router(tmp_path / "one", chat_model, adapters, ("ab",))
    write_adapter(tmp_path / "other", chat_model, dict.fromkeys(TARGETS, 3), seed=8)

    def refused(message: str, new: str = "new", router: str = "old", **changes: Any) -> None:
        asked = {"tasks": TASKS, "adapters": adapters, "recipe": RECIPE, **changes}
        with pytest.raises(TrainError, match=message):
            extend_router(
                tmp_path / router, new, chat_model, asked["tasks"], asked["adapters"], tmp_path / "out", asked["recipe"]
            )
        assert not (tmp_path / "out").exists()

    refused("adapter none: expected its folder, and a task of its name", "none")
    refused("adapter plain: expected its folder", "plain")
    refused("one row beside that of new", router="one")
    refused("tasks: expected one of another adapter", tasks=TASKS[1:3])
    refused("adapter ab: its weights are not those", adapters={**adapters, "ab": tmp_path / "other"})
    write_adapter(tmp_path / "wider", chat_model, dict.fromkeys(("q_proj", "o_proj"), 3), seed=8)
    refused("touches o_proj, where the router has no gates", adapters={**adapters, "new": tmp_path / "wider"})
    refused("nowhere", adapters={**adapters, "new": tmp_path / "nowhere"})
    refused("ridge 0: expected a number above 0", recipe=ExtendRecipe(ridge=0))
    refused("others 0: expected a whole number", recipe=ExtendRecipe(others=0))
    refused("rounds -1: expected a whole number", recipe=ExtendRecipe(rounds=-1))
    refused("adapter xyz: expected its folder", adapters={name: adapters[name] for name in ("ab", "new")})


def test_the_command(chat_model: Path, adapters: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    make_router(tmp_path / "old", chat_model, adapters, ("xyz", "ab"))
    for task in TASKS:
        write_task(tmp_path / "tasks", task)
    common = ["--model", str(chat_model), "--tasks", str(tmp_path / "tasks"), "--adapters", str(adapters["ab"].parent)]
    common += ["--router", str(tmp_path / "old"), "--out", str(tmp_path / "out")]
    assert main([*common, "--add", "new", "--samples", "3"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert json.loads(said[0]).keys() >= {"seconds", "new", "others_answer"}
    assert said[1] == str(tmp_path / "out")
    assert read_gates(tmp_path / "out").rows == 3
    assert main([*common, "--add", "none"]) == 2
    assert "adapter none: expected its folder" in capsys.readouterr().err
