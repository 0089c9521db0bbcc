"""The `lora` object of requests.

Nobody else's clients know it, so that a field which is not there can only be a mistake: `adapter` for `adapters` would
have the base model answer, and nobody would be told.
"""

from pydantic import ConfigDict, ValidationInfo, field_validator

from server.body import RequestModel, limits_of
from server.route_options import Finite, Name, RouterFields


class LoraAdapter(RequestModel):
    """What an answer says of an adapter can be sent again."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    """`name` or `name@digest`."""
    weight: Finite | None = None
    """Default 1/n. Negative ones are possible."""
    digest: str | None = None
    """Ignored: `name@digest` is a revision."""
    score: float | None = None
    """Ignored: what a router says of it in answers."""
    share: float | None = None
    """Ignored: what a router says of it in answers."""


class LoraOptions(RouterFields, RequestModel):
    """Which adapters: an explicit weighted list, or what a router may choose from."""

    model_config = ConfigDict(extra="forbid")

    adapters: list[LoraAdapter] | None = None
    """The mix, which wins over an adapter that `model` names; at most `limits.adapters`. Excludes `router`."""
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
