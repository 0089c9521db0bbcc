"""Bodies about routers: prompts to route, and trained routers to register."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from fastapi import Request
from pydantic import Field

from adapters_store.contents import ROUTER
from adapters_store.sources import fetch
from server.admin.protocol import AdminModel, FormModel, TenantName
from server.admin.upload import receive, unpack
from server.body import json_body, schema_of
from server.config import LimitSettings
from server.deps import Services
from server.errors import BadRequest
from server.route_options import RouterFields
from server.tenants import Caller

RouterName = Annotated[str, Field(min_length=1, max_length=128, examples=["support"])]
Replace = Annotated[bool, Field(description="Whether a router of this name is replaced, instead of an answer 409.")]


class RouteMessage(AdminModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str


class RouteRequest(RouterFields, AdminModel):
    """A prompt, or messages of which the last user turn is read."""

    prompt: str | None = None
    messages: Annotated[list[RouteMessage], Field(min_length=1)] | None = None
    tenant: Annotated[TenantName, Field(description="As which tenant; others than one's own need the admin key.")] | (
        None
    ) = None

    @classmethod
    def parse(cls, data: dict[str, Any], limits: LimitSettings) -> Self:
        request = super().parse(data, limits)
        if (request.prompt is None) == (request.messages is None):
            raise BadRequest("prompt: expected either prompt or messages", param="prompt")
        return request


class RegisterRouterRequest(AdminModel):
    name: RouterName
    source: Annotated[
        str,
        Field(
            min_length=1,
            max_length=2048,
            description="Where the router's folder lies, as for adapters.",
            examples=["file:///routers/support"],
        ),
    ]
    replace: Replace = False


class UploadRouterRequest(FormModel):
    """The text fields of a multipart upload."""

    texts: ClassVar = ("name",)

    name: RouterName
    replace: Replace = False


@dataclass(frozen=True)
class TakenRouter:
    """A router that has arrived, unchecked, in a folder of its own."""

    name: str
    folder: Path
    replace: bool


register_body = json_body(RegisterRouterRequest)


@asynccontextmanager
async def taken_router(
    request: Request, staging: Path, services: Services, caller: Caller
) -> AsyncIterator[TakenRouter]:
    """The router of a request's body. Raises ServerError, AdapterError, BlobError."""
    catalog, policy = services.catalog, services.catalog.policies.of_caller(caller)
    folder = staging / "router"
    async with catalog.slots.take(caller):
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
            body = await register_body(request)
            await catalog.in_thread(fetch, body.source, folder, policy, ROUTER)
            yield TakenRouter(body.name, folder, body.replace)
            return
        parts = staging / "parts"
        parts.mkdir()
        upload = await receive(request, parts, catalog, policy, ROUTER, UploadRouterRequest.model_fields)
        fields = UploadRouterRequest.parse_form(dict(upload.fields), services.limits)
        await unpack(upload, folder, catalog, policy.archive_limits, ROUTER)
        yield TakenRouter(fields.name, folder, fields.replace)


def router_schema() -> dict[str, Any]:
    """What OpenAPI says of the form."""
    schema = schema_of(UploadRouterRequest)
    file = {"type": "string", "format": "binary"}
    schema["properties"] |= {
        "config": file | {"description": "`router.json`"},
        "weights": file | {"description": "`router.safetensors`"},
        "archive": file | {"description": "Instead of the two: a .zip or .tar.gz that holds them"},
    }
    return schema
