"""The `lora` object of requests and responses, and the header `x-loramux-route`."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from routing.router import Route
from server.body import RequestModel, limits_of

LARGEST_WEIGHT = 3.4e38
"""Weights are single precision on the device."""
MAX_HEADER_ADAPTERS = 16
HEADER = "x-loramux-route"

Finite = Annotated[float, Field(ge=-LARGEST_WEIGHT, le=LARGEST_WEIGHT)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class LoraAdapter(RequestModel):
    name: Name
    weight: Finite | None = None


class LoraOptions(RequestModel):
    """Which adapters: an explicit weighted list, or what a router may choose from."""

    adapters: list[LoraAdapter] | None = None
    composition: Literal["mixture", "fusion", "selection"] | None = None
    router: Name | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None
    min_score: float | None = None
    candidates: list[Name] | None = None
    sticky: bool | None = None
    explain: bool | None = None

    @field_validator("adapters", "candidates")
    @classmethod
    def _bounded(cls, value: list[Any] | None, info: ValidationInfo) -> list[Any] | None:
        most = limits_of(info).adapters
        if value is not None and len(value) > most:
            raise ValueError(f"expected at most {most} adapters")
        return value


def lora_object(route: Route) -> dict[str, Any]:
    """The decision as responses show it; a base answer has no router and no adapters."""
    adapters = []
    for adapter in route.adapters:
        shown = {"name": adapter.name, "digest": adapter.digest, "weight": adapter.weight}
        adapters.append(shown if adapter.score is None else shown | {"score": adapter.score})
    return {
        "router": route.router,
        "composition": route.composition.value,
        "cached": route.cached,
        "route_ms": round(route.seconds * 1000, 3),
        "adapters": adapters,
    }


def route_header(route: Route) -> dict[str, str]:
    """The same as a header: compact ASCII JSON, with at most 16 adapters."""
    shown = lora_object(route)
    if len(shown["adapters"]) > MAX_HEADER_ADAPTERS:
        shown["adapters"] = shown["adapters"][:MAX_HEADER_ADAPTERS]
        shown["truncated"] = True
    return {HEADER: json.dumps(shown, separators=(",", ":"))}
