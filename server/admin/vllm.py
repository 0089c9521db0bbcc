"""vLLM's endpoints for adapters that come and go, so that its users and controllers need no change."""

import re
from pathlib import PurePosixPath
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Depends
from fastapi.responses import PlainTextResponse, Response

from adapters_store.registry import NameTaken, RegistryError
from adapters_store.store import NewAdapter
from adapters_store.types import AdapterError
from server.admin.access import AdminDep, get_admin
from server.admin.protocol import LoadLoraRequest, UnloadLoraRequest
from server.answers import REFUSALS, text
from server.body import document, json_body
from server.deps import ServicesDep, check_not_draining
from server.errors import BadRequest, refusal

router = APIRouter(prefix="/v1", dependencies=[Depends(get_admin)], responses=REFUSALS)

LoadBody = Annotated[LoadLoraRequest, Depends(json_body(LoadLoraRequest))]
UnloadBody = Annotated[UnloadLoraRequest, Depends(json_body(UnloadLoraRequest))]

FIELDS = {"name": "lora_name", "source": "lora_path"}
"""vLLM's names of what errors are about."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@router.post(
    "/load_lora_adapter",
    response_class=Response,
    responses=text("What was done."),
    summary="Load an adapter (vLLM)",
    dependencies=[Depends(check_not_draining)],
    openapi_extra=document(LoadLoraRequest),
)
async def load_lora_adapter(body: LoadBody, services: ServicesDep, caller: AdminDep) -> PlainTextResponse:
    """Registers it for every tenant, durably. `POST /admin/v1/adapters` does more."""
    _check_given(lora_name=body.lora_name, lora_path=body.lora_path)
    new = NewAdapter(body.lora_name, caller.tenant.id, public=True, replace=body.load_inplace)
    try:
        await services.catalog.add_source(caller, new, _source(body.lora_path))
    except NameTaken as error:
        message = f"the adapter {body.lora_name!r} has already been loaded: expected load_inplace, or another name"
        raise BadRequest(message, param="lora_name", code=error.code) from error
    except (AdapterError, RegistryError) as error:  # also a name whose deletion waits for requests: for a moment, 409
        told = refusal(error)
        told.param = FIELDS.get(told.param or "")
        raise told from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post(
    "/unload_lora_adapter",
    response_class=Response,
    responses=text("What was done."),
    summary="Unload an adapter (vLLM)",
    openapi_extra=document(UnloadLoraRequest),
)
async def unload_lora_adapter(body: UnloadBody, services: ServicesDep, caller: AdminDep) -> PlainTextResponse:
    """No new request can use it; those that do end as they would have."""
    _check_given(lora_name=body.lora_name)
    await services.catalog.delete(caller, caller.tenant.id, body.lora_name, None)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _source(path: str) -> str:
    """A folder, or else a repository of the hub."""
    if PurePosixPath(path).is_absolute():
        return f"file://{quote(path)}"
    if HUB_ID.fullmatch(path):
        return f"hf://{path}"
    raise BadRequest(
        "lora_path: expected an absolute path under an adapter root, or a hub repository org/name", param="lora_path"
    )


def _check_given(**fields: str) -> None:
    for name, value in fields.items():
        if not value:
            raise BadRequest(
                f"{name}: expected a text that is not empty", param=name, code="missing_required_parameter"
            )
