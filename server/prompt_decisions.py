"""What a prompt-level router decided in the engine, as the route of an answer says it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from adapters_store.types import TARGETS
from routing.prompt_choice import HIDDEN
from routing.router import Outcome, Route
from server.engine.prompt_routers import Decided


def with_decision(route: Route, decided: Decided | None) -> Route:
    """The route with the adapters that were chosen, and how much of the model each acts in; as it is without one."""
    use = route.prompt_router
    if use is None or decided is None:
        return route
    shares: defaultdict[str, float] = defaultdict(float)
    for chosen in decided.chosen:
        for digest, weight in _weights(route, chosen):
            shares[digest] += weight / len(decided.chosen)
    adapters = [
        replace(each, weight=each.weight if use.layered else shares[each.digest], share=shares[each.digest])
        for each in route.adapters
        if shares[each.digest] > 0
    ]
    adapters.sort(key=lambda each: -(each.share or 0.0))
    return replace(
        route,
        adapters=tuple(adapters),
        cached=decided.cached,
        seconds=route.seconds + decided.seconds,
        outcome=Outcome.ROUTED if adapters else Outcome.NO_ADAPTER,
        decided=decided,
    )


def decided_layers(route: Route) -> dict[str, Any]:
    """By layer the experts that act there and, where the router has read, the probabilities of all that might."""
    if route.decided is None:
        return {}
    layers = []
    for number, chosen in enumerate(route.decided.chosen):
        layer: dict[str, Any] = {"chosen": [route.experts[expert] for expert in chosen]}
        if number < len(route.decided.probabilities):
            both = zip(route.experts, route.decided.probabilities[number], strict=True)
            layer["probabilities"] = [
                {"name": name, "probability": probability} for name, probability in both if name != HIDDEN
            ]
        layers.append(layer)
    return {"layers": layers}


def _weights(route: Route, chosen: Sequence[int]) -> list[tuple[str, float]]:
    """The adapters of one layer by digest, an even share for each; over linears the share of them that acts."""
    assert route.prompt_router is not None
    rows = route.prompt_router.rows
    if route.experts == TARGETS:
        return [(row, len(chosen) / len(TARGETS)) for row in rows if row is not None]
    return [(row, 1 / len(chosen)) for expert in chosen if expert < len(rows) and (row := rows[expert]) is not None]
