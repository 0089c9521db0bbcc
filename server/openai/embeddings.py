"""POST /v1/embeddings."""

import asyncio
import base64
from typing import Annotated, Any, Literal, Self

import msgspec
import numpy as np
from fastapi import APIRouter, Depends, Request
from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from routing.encoder_model import normalised
from routing.router import RouteQuery
from server.ask import Ask
from server.body import RequestModel, document, json_body, limits_of, validate
from server.config import LimitSettings
from server.deps import CallerDep, Services, ServicesDep, check_not_draining, get_caller, knock
from server.embedder import Embedder
from server.engine.sequence import SamplingParams
from server.errors import BadRequest
from server.openai.answer import collect
from server.openai.answers import EmbeddingList, answers
from server.openai.inputs import INPUTS_SCHEMA, Inputs, inputs_of
from server.openai.stream import unless_gone
from server.route_options import Name
from server.tenants import Tenant

router = APIRouter(dependencies=[Depends(get_caller)])

LARGE = 1 << 14
"""Numbers that are written in a thread: a millisecond's worth."""


def _inputs(value: object, info: ValidationInfo) -> Inputs:
    return inputs_of(value, "input", limits_of(info).inputs)


class EmbeddingsRequest(RequestModel):
    """OpenAI's fields, then vLLM's."""

    model: Name
    """The embedding model that /v1/models lists; any other model gives the mean of its last hidden states."""
    input: Annotated[Any, BeforeValidator(_inputs), WithJsonSchema(INPUTS_SCHEMA)]
    """Texts, or token ids of the model's own vocabulary; at most `limits.inputs`, or `limits.prompts` without the
    embedding model."""
    encoding_format: Literal["float", "base64"] | None = None
    """Default `float`. base64 is of little-endian float32."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Refused unless it is the model's own width."""
    user: str | None = None
    """Ignored: tenants are told apart by their keys."""

    truncate_prompt_tokens: Literal[-1] | None = None
    """-1 cuts texts that are too long, which are refused otherwise."""

    lora: None = None
    """Refused: `model` names an adapter."""
    adapter_id: None = None
    """Refused: `model` names an adapter."""

    @field_validator("lora", "adapter_id", mode="before")
    @classmethod
    def _named_by_model(cls, value: object) -> object:
        if value is not None:
            raise PydanticCustomError("unsupported", "not supported for embeddings; name the adapter in model")
        return value

    @classmethod
    def parse(cls, data: dict[str, Any], limits: LimitSettings) -> Self:
        return validate(cls, data, limits)


EmbeddingsBody = Annotated[EmbeddingsRequest, Depends(json_body(EmbeddingsRequest))]


@router.post(
    "/v1/embeddings",
    dependencies=[Depends(check_not_draining), Depends(knock)],
    openapi_extra=document(EmbeddingsRequest),
    responses=answers(EmbeddingList),
)
async def embeddings(body: EmbeddingsBody, request: Request, services: ServicesDep, caller: CallerDep) -> Response:
    """One vector of length 1 for each text: the embedding model's, or of any other model the mean of its last states.

    `truncate_prompt_tokens: -1` cuts texts that are too long for the embedding model.
    """
    embedder = services.embedder
    if embedder is not None and body.model == embedder.name:
        vectors, tokens = await _embedded(body, request, services, caller.tenant, embedder)
    else:
        vectors, tokens = await _pooled(body, request, services, caller.tenant)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return Response(await _encoded(vectors, body, body.model, usage), media_type="application/json")


async def _embedded(
    body: EmbeddingsRequest, request: Request, services: Services, tenant: Tenant, embedder: Embedder
) -> tuple[np.ndarray, int]:
    """Vectors of the embedding model, and how many tokens it read."""
    await services.quotas.fund(tenant.id, tokens=1, sequences=1)
    with services.quotas.admit(tenant.id) as meter:
        if body.dimensions not in (None, embedder.width):
            message = f"dimensions: embeddings of {embedder.name} cannot be shortened, expected {embedder.width}"
            raise BadRequest(message, param="dimensions", code="unsupported_value")
        texts, tokens = await embedder.read(body.input, body.truncate_prompt_tokens is not None)
        await services.quotas.fund(tenant.id, tokens=tokens)
        meter.reserve(tokens)
        try:
            vectors = await unless_gone(request, embedder.embed(texts, tenant.id))
        except BaseException:
            meter.give_back(tokens)
            raise
    services.usage.count_embeddings(tenant.id, embedder.name, tokens)
    services.metrics.embedded(tenant.id, tokens)
    return vectors, tokens


async def _pooled(
    body: EmbeddingsRequest, request: Request, services: Services, tenant: Tenant
) -> tuple[np.ndarray, int]:
    """Means of the last hidden states of the base model with the adapters that the model names, and of the prompts'
    tokens how many there are. They are prompts without an answer to everything else: quotas, leases, usage."""
    for field in ("dimensions", "truncate_prompt_tokens"):
        if getattr(body, field) is not None:
            message = f"{field}: only the embedding model takes it, {body.model!r} is none"
            raise BadRequest(message, param=field, code="unsupported_value")
    if len(body.input) > services.limits.prompts:
        message = f"input: expected at most {services.limits.prompts} for a model that generates text"
        raise BadRequest(message, param="input")
    query = RouteQuery(tenant.id, body.model, default_router=tenant.default_router)
    params = SamplingParams(max_tokens=0, pooled=True)
    generation = services.generator.start(Ask(tenant, query, params, prompts=body.input, max_tokens=0))
    pieces = generation.pieces()
    try:
        await unless_gone(request, collect(pieces))
    finally:
        await pieces.aclose()
    sums = np.stack([choice.pooled for choice in generation.choices if choice.pooled is not None])
    return normalised(sums), generation.usage.prompt_tokens


async def _encoded(vectors: np.ndarray, body: EmbeddingsRequest, model: str, usage: dict[str, int]) -> bytes:
    """The answer. Numbers go as base64 of little-endian float32 where that was asked for."""

    def encode() -> bytes:
        rows: list[Any]
        if body.encoding_format == "base64":
            rows = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors]
        else:
            rows = vectors.tolist()
        data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
        return msgspec.json.encode({"object": "list", "data": data, "model": model, "usage": usage})

    return await asyncio.to_thread(encode) if vectors.size > LARGE else encode()
