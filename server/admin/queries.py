"""Query parameters of the admin surface. Unknown ones are refused, by name."""

from datetime import date
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from server.admin.protocol import TenantName


class QueryModel(BaseModel):
    """Query parameters; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NoQuery(QueryModel):
    pass


class PageQuery(QueryModel):
    limit: Annotated[int, Field(ge=1, le=1000, description="Most entries of the answer.")] = 100
    cursor: Annotated[str, Field(max_length=512, description="`next` of the part before.")] | None = None


Addressed = Annotated[
    TenantName, Field(description="Whose adapter, for the admin key; by default the key's own tenant.")
]


class TenantQuery(QueryModel):
    tenant: Addressed | None = None


class AdaptersQuery(PageQuery):
    tenant: Addressed | None = None
    tag: Annotated[str, Field(max_length=128, description="Only adapters that have this tag.")] | None = None
    residency: Annotated[Literal["device", "host", "disk"], Field(description="Only adapters there.")] | None = None


class DeleteQuery(TenantQuery):
    wait: (
        Annotated[
            bool,
            Field(
                description="`true` answers when the last request that uses it has ended; `false` refuses with 409"
                " while it is in use; without it the answer is immediate, 202 while requests still use it."
            ),
        ]
        | None
    ) = None


class UsageQuery(PageQuery):
    tenant: Annotated[TenantName, Field(description="Whose use; the admin key sees all by default.")] | None = None
    since: Annotated[date, Field(description="First day, in UTC.", examples=["2026-01-31"])] | None = None
    until: Annotated[date, Field(description="Last day, in UTC.")] | None = None

    @field_validator("until")
    @classmethod
    def _not_before_since(cls, until: date | None, info: ValidationInfo) -> date | None:
        since = info.data.get("since")
        if until is not None and since is not None and until < since:
            raise ValueError(f"expected a day not before since, {since}")
        return until
