"""The row of an adapter that joins a router's gates: samples pass the model, and every linear's inputs are fitted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapters_store.linear_names import Module
from adapters_store.peft_format import AdapterFile
from adapters_store.types import GROUP_OF, AdapterWeights
from routing.gate_folder import GateCard
from routing.train.adapter import TrainError, check_device
from routing.train.batches import Example, encode
from routing.train.gate_tally import GateTally
from routing.train.gated_linear import GateChoice, GatedLinear, embed_adapters
from routing.train.one_adapter import Show, show_inputs
from routing.train.row_fit import RIDGE, RowFit, hits

BATCH_ROWS = 16


@dataclass(frozen=True, slots=True)
class ExtendRecipe:
    """How a row is fitted: to `samples` training rows of the new adapter's task and `others` of each other task.

    They pass the model once each under its own adapter, and then `rounds` times routed by the gates with the row fitted
    so far; what the linears see in all passes counts. Without rounds a row is hardly ever chosen: docs/results.md.
    """

    samples: int = 20
    others: int = 8
    ridge: float = RIDGE
    rounds: int = 3
    max_length: int = 512
    evaluation_rows: int = 10
    device: str = "cpu"

    def check(self) -> None:
        """Raise TrainError for the first field that cannot be."""
        for name in ("samples", "others"):
            if getattr(self, name) < 1:
                raise TrainError(f"{name} {getattr(self, name)}: expected a whole number of at least 1")
        if self.rounds < 0:
            raise TrainError(f"rounds {self.rounds}: expected a whole number of at least 0")
        if not self.ridge > 0:
            raise TrainError(f"ridge {self.ridge}: expected a number above 0")
        check_device(self.device)


@dataclass(frozen=True)
class SampledModel:
    """The model, the tasks with the row of the new gates that stands for each, and the adapters in the rows' order."""

    causal: Any
    tokenizer: Any
    labels: Mapping[str, int]
    adapters: Mapping[str, AdapterFile]
    card: GateCard

    def show(
        self, modules: Sequence[Module], weights: AdapterWeights | None, examples: Sequence[Example], show: Show
    ) -> Tensor:
        """As `show_inputs`."""
        return show_inputs(self.causal, modules, weights, examples, self.tokenizer.pad_token_id, show)

    def embed(self) -> dict[Module, GatedLinear]:
        """All adapters, weighed by gates as they will be served."""
        weights = [file.weights for file in self.adapters.values()]
        choice = GateChoice(self.card.top_k, self.card.temperature)
        return embed_adapters(self.causal, weights, self.card.has_null, choice, GateTally())

    def passes(self, rows: Mapping[str, Sequence[Any]], max_length: int) -> Iterator[tuple[str, list[Example]]]:
        """Batches of tasks' rows."""
        for name, own in rows.items():
            examples = encode(self.tokenizer, own, max_length)
            for first in range(0, len(examples), BATCH_ROWS):
                yield name, examples[first : first + BATCH_ROWS]


def extended_gates(
    world: SampledModel,
    gates: Mapping[Module, Tensor],
    new: str,
    place: int,
    rows: Mapping[str, Sequence[Any]],
    recipe: ExtendRecipe,
) -> dict[Module, Tensor]:
    """The gates with the new row; leaves the model with all adapters embedded, routed by them."""
    shared = _shared(gates)
    fits = {first: RowFit(torch.stack([gates[module] for module in own])) for first, own in shared.items()}

    def see(*, forced: bool) -> None:
        for name, examples in world.passes(rows, recipe.max_length):
            label = world.labels[name]
            row = None if name == new else label - (label > place)  # among the gates without the new one
            weights = world.adapters[name].weights if forced and name in world.adapters else None
            world.show(list(shared), weights, examples, partial(_add, fits, row))

    see(forced=True)
    found = _with_rows(gates, shared, fits, place, recipe.ridge)
    linears = world.embed()
    for turn in range(recipe.rounds + 1):
        if not all(bool(torch.isfinite(gate).all()) for gate in found.values()):
            raise TrainError(f"adapter {new}: its row is not finite, expected a larger ridge than {recipe.ridge}")
        for module, linear in linears.items():
            linear.gate.data.copy_(found[module])
        if turn < recipe.rounds:
            see(forced=False)
            found = _with_rows(gates, shared, fits, place, recipe.ridge)
    return found


def _add(fits: Mapping[Module, RowFit], row: int | None, module: Module, x: Tensor) -> None:
    fits[module].add(x, row)


def _with_rows(
    gates: Mapping[Module, Tensor],
    shared: Mapping[Module, Sequence[Module]],
    fits: Mapping[Module, RowFit],
    place: int,
    ridge: float,
) -> dict[Module, Tensor]:
    rows = {
        module: row for first, own in shared.items() for module, row in zip(own, fits[first].rows(ridge), strict=True)
    }
    return {module: torch.cat([gate[:place], rows[module][None], gate[place:]]) for module, gate in gates.items()}


def _shared(gates: Mapping[Module, Tensor]) -> dict[Module, list[Module]]:
    """The gated linears that share an input, by the first of them."""
    groups: dict[tuple[int, str], list[Module]] = {}
    for layer, target in gates:
        groups.setdefault((layer, GROUP_OF[target].name), []).append((layer, target))
    return {own[0]: own for own in groups.values()}


def row_metrics(
    world: SampledModel,
    before: Mapping[Module, Tensor],
    after: Mapping[Module, Tensor],
    new: str,
    place: int,
    rows: Mapping[str, Sequence[Any]],
    recipe: ExtendRecipe,
) -> dict[str, float]:
    """How often the highest logit is that of the own row, over all gates and tokens of validation rows.

    Of the `new` adapter's and of `others`, and of these `before` there was the row; with `_answer` of the tokens that
    predict an answer's. The model is routed by the gates with the row.
    """
    shared = _shared(after)
    found: dict[str, list[Tensor]] = {}

    def adds(label: int, into: dict[str, Tensor]) -> Any:
        def add(module: Module, x: Tensor) -> None:
            for key, gates, row in (("after", after, label), ("before", before, label - (label > place))):
                own = hits([gates[each] for each in shared[module]], x, row) * len(shared[module])
                into[key] = own if key not in into else into[key] + own

        return add

    for name, examples in world.passes(rows, recipe.max_length):
        sums: dict[str, Tensor] = {}
        answers = world.show(list(shared), None, examples, adds(world.labels[name], sums))
        for key in ("after",) if name == new else ("after", "before"):
            what = "new" if name == new else "others" if key == "after" else "others_before"
            found.setdefault(what, []).append(sums[key] / len(after))
            found.setdefault(f"{what}_answer", []).append(sums[key][answers] / len(after))
    return {what: round(float(torch.cat(parts).mean()), 4) for what, parts in sorted(found.items())}
