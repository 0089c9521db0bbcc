"""Bodies of the admin surface. Unknown fields are refused, by name."""

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from adapters_store.merging import MergeMethod
from adapters_store.registry import NAME_PATTERN
from server.accounts import LARGEST_SHARE, LEAST_SHARE
from server.body import limits_of, validate
from server.config import LimitSettings
from server.errors import BadRequest

LARGEST_WEIGHT = 3.4e38
"""Weights are single precision on the device."""
MAX_SAMPLES = 50
MOST = 2**53
"""Larger integers are not exact in the JSON of many clients."""


def _stored(value: str) -> str:
    if "\0" in value:
        raise ValueError("expected text without the character NUL")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("expected text, found half of a surrogate pair") from None
    return value


Stored = Annotated[str, AfterValidator(_stored)]
"""What one of the databases refuses is refused by its field's name."""
Text = Annotated[Stored, Field(max_length=256)]
AdapterName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=128,
        description=f"`{NAME_PATTERN}`; `auto` and the base model's name are reserved.",
        examples=["sql"],
    ),
]
TenantName = Annotated[
    str, Field(min_length=1, max_length=128, description=f"A tenant's id, `{NAME_PATTERN}`.", examples=["acme"])
]
Tags = Annotated[
    list[Annotated[Stored, Field(min_length=1, max_length=128)]],
    Field(max_length=100, description="Labels to find it by.", examples=[["sql", "v2"]]),
]
Samples = Annotated[
    list[Annotated[Stored, Field(min_length=1, max_length=4096)]],
    Field(
        max_length=MAX_SAMPLES,
        description="Example inputs that the adapter is good at: routers find it by them. Without any, by its"
        " description.",
        examples=[["How many orders were placed in May?"]],
    ),
]
Description = Annotated[
    Stored, Field(max_length=4096, description="What it does; by default the first paragraph of the adapter's README.")
]
Public = Annotated[bool, Field(description="Whether every tenant may use it. Needs the admin key.")]
Pinned = Annotated[
    bool,
    Field(description="Whether it stays in the device's memory; at most half of the page pool. Needs the admin key."),
]
Replace = Annotated[
    bool, Field(description="Whether a name that exists gets a new revision, instead of an answer 409.")
]


class AdminModel(BaseModel):
    """JSON types are taken as they are; fields that are not here are refused. null is the same as absent."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def parse(cls, data: dict[str, Any], limits: LimitSettings) -> Self:
        """The checked body. Raises BadRequest that names the first offending field."""
        return validate(cls, data, limits)


class FormModel(AdminModel):
    """The text fields of a form: `texts` as they are, the others as JSON text."""

    texts: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def parse_form(cls, fields: dict[str, str], limits: LimitSettings) -> Self:
        """Raises BadRequest, as `parse` does."""
        data: dict[str, Any] = {}
        for name, text in fields.items():
            data[name] = text if name in cls.texts or name not in cls.model_fields else _json(name, text)
        return cls.parse(data, limits)


class NewAdapterFields(AdminModel):
    """What a new adapter is called and whose it is, wherever its weights come from."""

    name: AdapterName
    tenant: TenantName | None = None
    public: Public | None = None
    pinned: Pinned | None = None
    tags: Tags | None = None
    samples: Samples | None = None
    description: Description | None = None
    replace: Replace = False


class RegisterRequest(NewAdapterFields):
    source: Annotated[
        str,
        Field(
            min_length=1,
            max_length=2048,
            description="Where the adapter lies: `file:///folder` under an allowed root (admin key),"
            " `hf://org/repo@rev`, `s3://bucket/prefix` or `https://host/folder`, as the server's settings allow."
            " A source that ends in .zip, .tar.gz or .tgz is an archive.",
            examples=["hf://acme/sql-lora@main"],
        ),
    ]


class UploadRequest(NewAdapterFields, FormModel):
    """The text fields of a multipart upload; `tags` and `samples` are JSON text, the switches `true` or `false`."""

    texts: ClassVar = ("name", "tenant", "description")


class PatchRequest(AdminModel):
    """What is absent stays as it is."""

    digest: (
        Annotated[
            str,
            Field(
                min_length=4,
                max_length=64,
                description="One of the name's revisions, or the unique beginning of its digest: the name moves there.",
            ),
        ]
        | None
    ) = None
    public: Public | None = None
    pinned: Pinned | None = None
    tags: Tags | None = None
    samples: Samples | None = None
    description: Description | None = None


class MergeEntry(AdminModel):
    name: Annotated[str, Field(min_length=1, max_length=256, description="`name` or `name@<digest prefix>`.")]
    weight: Annotated[float, Field(ge=-LARGEST_WEIGHT, le=LARGEST_WEIGHT, examples=[0.5])] = 1.0


class MergeRequest(AdminModel):
    name: AdapterName
    tenant: TenantName | None = None
    public: Public | None = None
    tags: Tags | None = None
    samples: Samples | None = None
    description: Description | None = None
    replace: Replace = False
    adapters: Annotated[list[MergeEntry], Field(min_length=1)]
    method: Annotated[
        Literal["cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"],
        Field(
            description="`cat` is the exact weighted sum at the sum of the ranks, `svd` its best approximation of"
            " `rank`; `linear` sums the factors; the others prune them to `density` first (TIES, DARE, magnitude)."
        ),
    ]
    rank: Annotated[int, Field(ge=1, le=4096, description="Of `svd`; by default the largest of all.")] | None = None
    density: (
        Annotated[float, Field(gt=0, le=1, description="Share of entries that pruning keeps.", examples=[0.5])] | None
    ) = None
    seed: Annotated[int, Field(ge=0, lt=MOST, description="Decides what DARE drops.")] = 0

    @field_validator("adapters")
    @classmethod
    def _bounded(cls, value: list[MergeEntry], info: ValidationInfo) -> list[MergeEntry]:
        most = limits_of(info).adapters
        if len(value) > most:
            raise ValueError(f"expected at most {most} adapters")
        return value

    @property
    def chosen(self) -> MergeMethod:
        return MergeMethod(self.method)


Count = Annotated[int, Field(ge=1, le=MOST)]


class QuotaFields(AdminModel):
    """Limits of one tenant; an absent one is unlimited."""

    requests_per_second: Annotated[float, Field(gt=0, le=1e9, examples=[50.0])] | None = None
    tokens_per_minute: Annotated[Count, Field(description="Prompt and output together.", examples=[100_000])] | None = (
        None
    )
    concurrency: (
        Annotated[
            int, Field(ge=0, le=MOST, description="Sequences at the same time: `n` for each prompt.", examples=[16])
        ]
        | None
    ) = None
    adapters: Annotated[int, Field(ge=0, le=MOST, description="Names.")] | None = None
    bytes: Annotated[int, Field(ge=0, le=MOST, description="Of all its revisions; equal ones count once.")] | None = (
        None
    )


Weight = Annotated[
    float,
    Field(
        ge=LEAST_SHARE,
        le=LARGEST_SHARE,
        description="Share of the engine's tokens beside other busy tenants.",
        examples=[1.0],
    ),
]
DefaultRouter = Annotated[
    str,
    Field(
        pattern=f"^{NAME_PATTERN}$",
        description="What `model: auto` means for this tenant: `retriever` or a registered router.",
        examples=["retriever"],
    ),
]


class TenantRequest(AdminModel):
    id: TenantName
    weight: Weight = 1.0
    quotas: QuotaFields = QuotaFields()
    default_router: DefaultRouter | None = None


class TenantPatch(AdminModel):
    """What is absent stays as it is; null removes a quota or the default router."""

    weight: Weight | None = None
    quotas: QuotaFields | None = None
    default_router: DefaultRouter | None = None


class KeyRequest(AdminModel):
    label: Annotated[Text, Field(description="To tell keys apart.", examples=["ci"])] = ""


class NoFields(AdminModel):
    """A body without content."""


class LoadLoraRequest(BaseModel):
    """vLLM's; fields that this server has no use for are ignored, as vLLM does."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    lora_name: str = Field("", max_length=256, examples=["sql"])
    lora_path: str = Field(
        "",
        max_length=2048,
        description="A folder under one of the server's adapter roots, or a Hugging Face repository `org/name`.",
        examples=["/adapters/sql"],
    )
    load_inplace: bool = Field(False, description="Whether a name that exists is given new weights.")

    @classmethod
    def parse(cls, data: dict[str, Any], limits: LimitSettings) -> Self:
        return validate(cls, data, limits)


class UnloadLoraRequest(BaseModel):
    """vLLM's."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    lora_name: str = Field("", max_length=256, examples=["sql"])

    @classmethod
    def parse(cls, data: dict[str, Any], limits: LimitSettings) -> Self:
        return validate(cls, data, limits)


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRequest(f'{name}: expected JSON text, such as true or ["a"]', param=name) from None
