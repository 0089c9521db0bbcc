"""What answers of both surfaces share, as the documentation describes it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class AnswerModel(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class ErrorDetail(AnswerModel):
    message: str
    type: str
    param: Annotated[str | None, Field(description="The field at fault, by its dotted path.")]
    code: str | None


class Error(AnswerModel):
    """OpenAI's error body."""

    error: ErrorDetail


REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Error, "description": "OpenAI's error body; `param` names the field at fault."},
    503: {"model": Error, "description": "Not now: `Retry-After` says when to try again."},
}
"""What every endpoint may answer."""
LATE: dict[int | str, dict[str, Any]] = {
    504: {"model": Error, "description": "The request's own `timeout` was over before its answer began."}
}


def text(description: str) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route whose good answer is plain text; its `response_class` must be Starlette's `Response`."""
    return {200: {"description": description, "content": {"text/plain": {"schema": {"type": "string"}}}}}


class Health(AnswerModel):
    status: str


HEALTH: dict[int | str, dict[str, Any]] = {
    200: {"model": Health},
    503: {"model": Health, "description": "Not now: `Retry-After` says when to ask again."},
}


class RoutedAdapter(AnswerModel):
    name: str
    digest: str
    weight: float
    score: Annotated[
        float | None, Field(description="Cosine similarity of prompt and prototype, where the router compares them.")
    ] = None
    share: Annotated[
        float | None, Field(description="Its part in the answer, of routers that decide by token or by layer.")
    ] = None


class CandidateScore(AnswerModel):
    name: str
    score: float


class RouteAnswer(AnswerModel):
    """The `lora` object that an answer to this prompt would have, and why."""

    router: str | None
    composition: str
    cached: bool
    route_ms: float
    adapters: list[RoutedAdapter]
    outcome: Annotated[
        Literal["below_min_score", "no_candidates", "empty_text", "no_adapter", "undecided"] | None,
        Field(
            description="Why nothing was chosen: then the base model answers; or, for a router by prompt inside the"
            " model, that it chooses among these adapters only when the prompt is computed."
        ),
    ] = None
    scores: Annotated[list[CandidateScore], Field(description="Every candidate, best first.")] = []
    warnings: Annotated[list[str], Field(description="Adapters that are not meant to be used like this.")] = []
