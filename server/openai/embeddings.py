"""POST /v1/embeddings."""

import asyncio
import base64
from typing import Annotated, Any, Literal, Self

import msgspec
import numpy as np
from fastapi import APIRouter, Depends, Request
from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema
from starlette.responses import Response

from server.body import RequestModel, document, json_body, limits_of, validate
from server.config import LimitSettings
from server.deps import CallerDep, Services, ServicesDep, check_not_draining, get_caller, knock
from server.embedder import Embedder
from server.errors import BadRequest, NotFound
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
    """The embedding model that /v1/models lists."""
    input: Annotated[Any, BeforeValidator(_inputs), WithJsonSchema(INPUTS_SCHEMA)]
    """Texts, or token ids that are a text in the model's own vocabulary; at most `limits.inputs`."""
    encoding_format: Literal["float", "base64"] | None = None
    """Default `float`. base64 is of little-endian float32."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Refused unless it is the model's own width."""
    user: str | None = None
    """Ignored: tenants are told apart by their keys."""

    truncate_prompt_tokens: Literal[-1] | None = None
    """-1 cuts texts that are too long, which are refused otherwise."""

    @classmethod
    def parse(cls, data: dict[str, Any], limits: LimitSettings) -> Self:
        return validate(cls, data, limits)


EmbeddingsBody = Annotated[EmbeddingsRequest, Depends(json_body(EmbeddingsRequest))]


@router.post(
    "/v1/embeddings",
    dependencies=[Depends(check_not_draining), Depends(knock)],
    openapi_extra=document(EmbeddingsRequest),
)
async def embeddings(body: EmbeddingsBody, request: Request, services: ServicesDep, caller: CallerDep) -> Response:
    """One vector of length 1 for each text. `truncate_prompt_tokens: -1` cuts texts that are too long."""
    with services.quotas.admit(caller.tenant.id) as meter:
        embedder = _embedder(body, services)
        texts, tokens = await embedder.read(body.input, body.truncate_prompt_tokens is not None)
        meter.reserve(tokens)
        try:
            vectors = await unless_gone(request, embedder.embed(texts))
        except BaseException:
            meter.give_back(tokens)
            raise
    _count(services, caller.tenant, embedder, tokens)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return Response(await _encoded(vectors, body, embedder.name, usage), media_type="application/json")


def _embedder(body: EmbeddingsRequest, services: Services) -> Embedder:
    """Raises NotFound for another model, BadRequest for a width that it does not have."""
    embedder = services.embedder
    if embedder is None:
        message = "this server has no embedding model"
        raise NotFound(message, param="model", code="model_not_found")
    if body.model != embedder.name:
        message = f"the model {body.model!r} gives no embeddings, expected {embedder.name!r}"
        raise NotFound(message, param="model", code="model_not_found")
    if body.dimensions not in (None, embedder.width):
        message = f"dimensions: embeddings of {embedder.name} cannot be shortened, expected {embedder.width}"
        raise BadRequest(message, param="dimensions", code="unsupported_value")
    return embedder


def _count(services: Services, tenant: Tenant, embedder: Embedder, tokens: int) -> None:
    services.usage.count_embeddings(tenant.id, embedder.name, tokens)
    services.metrics.embedded(tenant.id, tokens)


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
