"""The `lora` object of requests."""

from pydantic import ValidationInfo, field_validator

from server.body import RequestModel, limits_of
from server.route_options import Finite, Name, RouterFields


class LoraAdapter(RequestModel):
    name: Name
    """`name` or `name@digest`."""
    weight: Finite | None = None
    """Default 1/n. Negative ones are possible."""


class LoraOptions(RouterFields, RequestModel):
    """Which adapters: an explicit weighted list, or what a router may choose from."""

    adapters: list[LoraAdapter] | None = None
    """The mix; at most `limits.adapters`. Excludes `router`."""
    sticky: bool | None = None
    """Default false. Keeps the decision of the conversation's first user turn."""
    explain: bool | None = None
    """Default false. The answer has the scores of all candidates, of token-level routers each token's adapter, of
    prompt-level ones what each layer chose."""

    @field_validator("adapters")
    @classmethod
    def _few_adapters(cls, value: list[LoraAdapter] | None, info: ValidationInfo) -> list[LoraAdapter] | None:
        most = limits_of(info).adapters
        if value is not None and len(value) > most:
            raise ValueError(f"expected at most {most} adapters")
        return value
