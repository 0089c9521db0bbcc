"""What the admin surface answers. Times are seconds since the epoch, sizes bytes."""

from typing import Annotated, Any, Literal

from pydantic import Field

from server.answers import AnswerModel

Residency = Literal["device", "host", "disk"]


class Revision(AnswerModel):
    digest: str
    created: float


class Adapter(AnswerModel):
    """A name and the adapter that it points to. `leases`, `requests` and `last_used` are the tenant's own.

    So is `residency`: a tenant's key sees where its own use of the adapter has brought it, the admin key where it is.
    """

    name: str
    digest: Annotated[str, Field(description="sha256 over what the adapter computes.")]
    tenant: Annotated[str, Field(description="Whose name it is.")]
    public: bool
    rank: int
    alpha: float
    targets: Annotated[list[str], Field(examples=[["q_proj", "v_proj"]])]
    modules: Annotated[int, Field(description="Linears that it touches.")]
    bytes: int
    tags: list[str]
    description: str
    pinned: bool
    residency: Residency
    leases: Annotated[int, Field(description="Requests that use it now.")]
    requests: int
    created: float
    last_used: float | None
    revisions: Annotated[list[Revision], Field(description="Oldest first.")]
    recipe: Annotated[dict[str, Any] | None, Field(description="Of a merged adapter, what it was made of.")] = None


class NewAdapter(Adapter):
    """A registration that is done."""

    modules_touched: Annotated[list[str], Field(examples=[["layers.0.self_attn.q_proj"]])]
    warnings: Annotated[list[str], Field(description="What is odd about it, but served.")]


class AdapterList(AnswerModel):
    data: list[Adapter]
    next: Annotated[str | None, Field(description="`cursor` of the following part; null at the end.")]


class Deletion(AnswerModel):
    name: str
    status: Annotated[
        Literal["gone", "draining"], Field(description="`draining`: requests that began before still use it.")
    ]


class RouterMember(AnswerModel):
    name: str
    digest: str
    state: Annotated[Literal["current", "replaced", "missing"], Field(description="What the name means by now.")]


class Router(AnswerModel):
    name: str
    kind: Annotated[
        str,
        Field(
            description="`retriever` compares prompts; inside the model `meteora` decides token by token, `milora` and"
            " `moa` once for a prompt."
        ),
    ]
    mode: Annotated[str | None, Field(description="What training changed: `head`, `lora` or `full`.")]
    encoder: Annotated[str | None, Field(description="Identifies the vectors: prototypes belong to one encoder.")]
    min_score: Annotated[float | None, Field(description="Below it the base model answers.")]
    adapters: Annotated[int, Field(description="Adapters that can be chosen now.")]
    members: Annotated[
        list[RouterMember] | None, Field(description="Of a router inside the model: what it was trained for.")
    ]
    stale: Annotated[bool, Field(description="Not what this server or its adapters are now; `problem` says why.")]
    problem: str | None
    training: Annotated[dict[str, Any] | None, Field(description="Recipe, tasks and metrics.")]
    created: float | None


class RouterList(AnswerModel):
    data: list[Router]
    next: None = None


class RouterRemoval(AnswerModel):
    name: str
    deleted: bool = True


class Quotas(AnswerModel):
    requests_per_second: float | None
    tokens_per_minute: int | None
    concurrency: int | None
    adapters: int | None
    bytes: int | None


class Tenant(AnswerModel):
    id: str
    weight: float
    quotas: Quotas
    default_router: str | None
    created: float


class TenantList(AnswerModel):
    data: list[Tenant]
    next: str | None


class Removal(AnswerModel):
    id: str
    status: Literal["gone"] = "gone"


class Key(AnswerModel):
    id: str
    label: str
    created: float
    revoked: Annotated[float | None, Field(description="Since when it no longer works.")]


class NewKey(Key):
    """The only time that the key is seen."""

    key: Annotated[str, Field(examples=["lm-5f0c2ab9d1e4-..."])]


class KeyList(AnswerModel):
    data: list[Key]
    next: str | None = None


class UsageLine(AnswerModel):
    tenant: str
    adapter: Annotated[str, Field(description="Empty for the base model.")]
    day: Annotated[str, Field(description="In UTC.", examples=["2026-01-31"])]
    requests: int
    prompt_tokens: int
    generation_tokens: int


class UsageList(AnswerModel):
    data: list[UsageLine]
    next: str | None


class EngineState(AnswerModel):
    id: str
    alive: bool
    device: str | None
    dtype: str | None
    running: Annotated[int, Field(description="Sequences in the batch.")]
    waiting: Annotated[int, Field(description="Sequences in the queue.")]
    kv_blocks: int
    kv_used_blocks: int
    pages: Annotated[dict[str, int], Field(description="Rank pages by state.")]
    adapters: Annotated[dict[str, int], Field(description="Adapters by tier.")]
    preemptions: int
    memory: Annotated[dict[str, int], Field(description="How the device's memory is shared out.")]


class State(AnswerModel):
    draining: bool
    requests: Annotated[int, Field(description="HTTP requests that are being answered.")]
    running: int
    waiting: int
    oldest_waiting_seconds: Annotated[
        float | None, Field(description="Age of the oldest request without a first token.")
    ]
    oldest_running_seconds: float | None
    uploads: Annotated[int, Field(description="Adapters that are being received or merged.")]
    engines: list[EngineState]
    uptime_seconds: float


class Drain(AnswerModel):
    running: Annotated[int, Field(description="Requests that are still being answered.")]
