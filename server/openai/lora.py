"""The `lora` object of requests."""

from pydantic import ValidationInfo, field_validator

from server.body import RequestModel, limits_of
from server.route_options import Finite, Name, RouterFields


class LoraAdapter(RequestModel):
    name: Name
    weight: Finite | None = None


class LoraOptions(RouterFields, RequestModel):
    """Which adapters: an explicit weighted list, or what a router may choose from."""

    adapters: list[LoraAdapter] | None = None
    sticky: bool | None = None
    explain: bool | None = None

    @field_validator("adapters")
    @classmethod
    def _few_adapters(cls, value: list[LoraAdapter] | None, info: ValidationInfo) -> list[LoraAdapter] | None:
        most = limits_of(info).adapters
        if value is not None and len(value) > most:
            raise ValueError(f"expected at most {most} adapters")
        return value
