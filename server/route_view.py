"""A decision about adapters, as answers show it: the object `lora`, and the header `x-loramux-route`."""

import json
from typing import Any

from routing.router import Outcome, Route

MAX_HEADER_ADAPTERS = 16
HEADER = "x-loramux-route"


def lora_object(route: Route) -> dict[str, Any]:
    """The decision as responses show it; a base answer has no adapters, and says why if a router was asked."""
    adapters = []
    for adapter in route.adapters:
        entry = {"name": adapter.name, "digest": adapter.digest, "weight": adapter.weight}
        more = {"score": adapter.score, "share": adapter.share}
        adapters.append(entry | {name: value for name, value in more.items() if value is not None})
    shown: dict[str, Any] = {
        "router": route.router,
        "composition": route.composition.value,
        "cached": route.cached,
        "route_ms": round(route.seconds * 1000, 3),
        "adapters": adapters,
    }
    if route.prompt_router is not None and route.decided is None:
        shown["outcome"] = Outcome.UNDECIDED.value  # as in a dry run, where no engine decides
    elif route.outcome is not Outcome.ROUTED:
        shown["outcome"] = route.outcome.value
    if route.warnings:
        shown["warnings"] = list(route.warnings)
    return shown


def explained(route: Route) -> dict[str, Any]:
    """The decision with the scores of all candidates, if they were asked for."""
    shown = lora_object(route)
    if route.scores is not None:
        shown["scores"] = [{"name": scored.name, "score": scored.score} for scored in route.scores]
    return shown


def route_header(route: Route) -> dict[str, str]:
    """The decision as a header: compact ASCII JSON, with at most 16 adapters."""
    shown = lora_object(route)
    if len(shown["adapters"]) > MAX_HEADER_ADAPTERS:
        shown["adapters"] = shown["adapters"][:MAX_HEADER_ADAPTERS]
        shown["truncated"] = True
    return {HEADER: json.dumps(shown, separators=(",", ":"))}
