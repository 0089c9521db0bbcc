"""What a client may say about how a router chooses, in requests that generate and in those that only ask."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from routing.router_options import RouterOptions
from server.body import limits_of

LARGEST_WEIGHT = 3.4e38
"""Weights are single precision on the device."""

Finite = Annotated[float, Field(ge=-LARGEST_WEIGHT, le=LARGEST_WEIGHT)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class RouterFields(BaseModel):
    """Absent fields leave the value to the router."""

    composition: Annotated[
        Literal["mixture", "fusion", "selection"] | None,
        Field(
            description="Default `mixture`, the weighted sum of outputs; factors averaged; the one of highest weight."
        ),
    ] = None
    router: Annotated[Name, Field(description="Which router; by default the tenant's own default.")] | None = None
    top_k: Annotated[int, Field(ge=1, description="How many adapters at most.")] | None = None
    temperature: (
        Annotated[float, Field(gt=0, le=LARGEST_WEIGHT, description="Weights by softmax of the scores over it.")] | None
    ) = None
    score_mass: (
        Annotated[float, Field(gt=0, le=1, description="No more adapters than hold this share of the softmax.")] | None
    ) = None
    min_score: Annotated[Finite, Field(description="Below it the base model answers.")] | None = None
    candidates: Annotated[list[Name], Field(description="Only these may be chosen.")] | None = None
    query: (
        Annotated[Literal["last_turn", "conversation"], Field(description="What of the messages is read.")] | None
    ) = None

    @field_validator("candidates")
    @classmethod
    def _bounded(cls, value: list[str] | None, info: ValidationInfo) -> list[str] | None:
        most = limits_of(info).adapters
        if value is not None and len(value) > most:
            raise ValueError(f"expected at most {most} adapters")
        return value

    @field_validator("top_k")
    @classmethod
    def _few(cls, value: int | None, info: ValidationInfo) -> int | None:
        most = limits_of(info).adapters
        if value is not None and value > most:
            raise ValueError(f"expected at most {most}")
        return value

    def router_options(self, *, sticky: bool = False, explain: bool = False) -> RouterOptions:
        return RouterOptions(
            top_k=self.top_k,
            temperature=self.temperature,
            score_mass=self.score_mass,
            min_score=self.min_score,
            candidates=None if self.candidates is None else tuple(dict.fromkeys(self.candidates)),
            sticky=sticky,
            explain=explain,
        )
