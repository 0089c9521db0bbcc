"""/admin/v1/adapters and /admin/v1/merges."""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse

from adapters_store.registry import NamedAdapter
from adapters_store.store import NewAdapter
from server.admin import answers
from server.admin.access import COUNTED, no_query
from server.admin.protocol import MergeRequest, NewAdapterFields, PatchRequest, RegisterRequest, UploadRequest
from server.admin.queries import AdaptersQuery, DeleteQuery, TenantQuery
from server.admin.upload import drain, receive, unpack, upload_schema
from server.answers import REFUSALS
from server.body import document, json_body, schema_of
from server.catalog import Added, Changes, Recipe, Shown, check_new, tenant_of
from server.deps import CallerDep, Services, ServicesDep, check_not_draining, count_request, get_caller
from server.errors import Unavailable
from server.tenants import Caller

router = APIRouter(prefix="/admin/v1", dependencies=[Depends(get_caller), Depends(count_request)], responses=REFUSALS)

register_body = json_body(RegisterRequest)
PatchBody = Annotated[PatchRequest, Depends(json_body(PatchRequest))]
MergeBody = Annotated[MergeRequest, Depends(json_body(MergeRequest))]


@router.post(
    "/adapters",
    status_code=HTTPStatus.CREATED,
    response_model=answers.NewAdapter,
    summary="Register an adapter",
    dependencies=[Depends(no_query)],
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": schema_of(RegisterRequest)},
                "multipart/form-data": {"schema": upload_schema()},
            },
        }
    },
)
async def register(request: Request, services: ServicesDep, caller: CallerDep) -> answers.NewAdapter:
    """From a `source` (JSON), or as an upload: the two files that PEFT saves, or one archive of them.

    The adapter is checked against the base model before anything of it is visible, and can be used in the next
    request. A name that exists is refused with 409, or gets a new revision with `replace`.

    An adapter that cannot be served is refused with 422 and one of these codes: `adapter_touches_no_module`,
    `adapter_shape_mismatch`, `adapter_unknown_tensor`, `adapter_not_finite`, `adapter_unsupported`,
    `adapter_wrong_base`, `adapter_bad_config`, `adapter_corrupt`, `adapter_incomplete`, `adapter_unsafe`; 413
    `adapter_too_large`, 415 `not_safetensors`. Beyond the tenant's quota: 429.

        curl -H "Authorization: Bearer $KEY" -F name=sql -F config=@adapter_config.json \\
             -F weights=@adapter_model.safetensors http://localhost:8000/admin/v1/adapters
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return _added(await _take_upload(request, services, caller))
    await check_not_draining(services)
    body = await register_body(request)
    return _added(await services.catalog.add_source(caller, _new(caller, body), body.source))


@router.get("/adapters", response_model=answers.AdapterList, summary="List adapters", dependencies=COUNTED)
async def list_adapters(
    query: Annotated[AdaptersQuery, Query()], services: ServicesDep, caller: CallerDep
) -> answers.AdapterList:
    """A tenant's own adapters by name. `GET /v1/models` lists the public ones too."""
    catalog = services.catalog
    page = await catalog.page(
        caller,
        tenant_of(caller, query.tenant),
        limit=query.limit,
        cursor=query.cursor,
        tag=query.tag,
        residency=query.residency,
    )
    return answers.AdapterList(data=[_adapter(shown) for shown in page.items], next=page.next)


@router.get("/adapters/{name}", response_model=answers.Adapter, summary="Show an adapter", dependencies=COUNTED)
async def get_adapter(
    name: str, query: Annotated[TenantQuery, Query()], services: ServicesDep, caller: CallerDep
) -> answers.Adapter:
    """What the name means for the tenant: its own adapter, or else a public one."""
    catalog = services.catalog
    return _adapter(await catalog.get(caller, tenant_of(caller, query.tenant), name))


@router.patch(
    "/adapters/{name}",
    response_model=answers.Adapter,
    summary="Change an adapter",
    dependencies=COUNTED,
    openapi_extra=document(PatchRequest),
)
async def change_adapter(
    name: str, body: PatchBody, query: Annotated[TenantQuery, Query()], services: ServicesDep, caller: CallerDep
) -> answers.Adapter:
    """What the body names changes, the rest stays. With `digest` the name moves to that one of its revisions.

    `public` and `pinned` need the admin key, and so does any change of a public adapter. A pin beyond half of the page
    pool is refused with 409 `pins_exhausted`.
    """
    catalog = services.catalog
    changes = Changes(
        digest=body.digest,
        public=body.public,
        pinned=body.pinned,
        description=body.description,
        tags=_tuple(body.tags),
        samples=_tuple(body.samples),
    )
    return _adapter(await catalog.change(caller, tenant_of(caller, query.tenant), name, changes))


@router.delete(
    "/adapters/{name}",
    response_model=answers.Deletion,
    summary="Delete an adapter",
    responses={
        202: {"model": answers.Deletion, "description": "No new request can use it; it goes when the last one ends."}
    },
)
async def delete_adapter(
    name: str, query: Annotated[DeleteQuery, Query()], services: ServicesDep, caller: CallerDep
) -> JSONResponse:
    """The name is gone at once for new requests; those that use it end as they would have."""
    catalog = services.catalog
    is_gone = await catalog.delete(caller, tenant_of(caller, query.tenant), name, query.wait)
    answer = answers.Deletion(name=name, status="gone" if is_gone else "draining")
    return JSONResponse(answer.model_dump(), HTTPStatus.OK if is_gone else HTTPStatus.ACCEPTED)


@router.post(
    "/adapters/{name}/prefetch",
    response_model=answers.Adapter,
    summary="Load an adapter",
    dependencies=[Depends(check_not_draining), *COUNTED],
)
async def prefetch_adapter(
    name: str, query: Annotated[TenantQuery, Query()], services: ServicesDep, caller: CallerDep
) -> answers.Adapter:
    """Brings it to the device's memory, or to the host's where the device has no room; `residency` tells."""
    catalog = services.catalog
    return _adapter(await catalog.prefetch(caller, tenant_of(caller, query.tenant), name))


@router.post(
    "/merges",
    status_code=HTTPStatus.CREATED,
    response_model=answers.NewAdapter,
    summary="Merge adapters",
    dependencies=[Depends(check_not_draining), Depends(no_query)],
    openapi_extra=document(MergeRequest),
)
async def merge(body: MergeBody, services: ServicesDep, caller: CallerDep) -> answers.NewAdapter:
    """A new adapter made of weighted ones; its `recipe` is recorded. Equal requests give equal adapters."""
    catalog = services.catalog
    entries = tuple((entry.name, entry.weight) for entry in body.adapters)
    recipe = Recipe(entries, body.chosen, body.rank, body.density, body.seed)
    return _added(await catalog.merge(caller, _new(caller, body), recipe))


async def _take_upload(request: Request, services: Services, caller: Caller) -> Added:
    catalog, policy = services.catalog, services.catalog.policies.of_caller(caller)
    try:
        await check_not_draining(services)
        async with catalog.slots.take(caller), services.store.staging() as staging:
            parts, folder = staging / "parts", staging / "adapter"
            parts.mkdir()
            upload = await receive(request, parts, catalog, policy, texts=UploadRequest.model_fields)
            fields = UploadRequest.parse_form(dict(upload.fields), services.limits)
            new = _new(caller, fields)
            check_new(caller, new)
            await unpack(upload, folder, catalog, policy.archive_limits)
            return await catalog.add_folder(caller, new, folder)
    except Unavailable:
        await drain(request, policy.timeout)
        raise


def _new(caller: Caller, body: NewAdapterFields | MergeRequest) -> NewAdapter:
    return NewAdapter(
        name=body.name,
        tenant=tenant_of(caller, body.tenant),
        public=body.public,
        pinned=body.pinned if isinstance(body, NewAdapterFields) else None,
        description=body.description,
        tags=_tuple(body.tags),
        samples=_tuple(body.samples),
        replace=body.replace,
    )


def _tuple(items: list[str] | None) -> tuple[str, ...] | None:
    return None if items is None else tuple(items)


def _adapter(shown: Shown) -> answers.Adapter:
    return answers.Adapter(**_fields(shown))


def _added(added: Added) -> answers.NewAdapter:
    return answers.NewAdapter(
        **_fields(added.shown), modules_touched=list(added.modules_touched), warnings=list(added.warnings)
    )


def _fields(shown: Shown) -> dict[str, Any]:
    adapter: NamedAdapter = shown.adapter
    stored = adapter.adapter
    return {
        "name": adapter.name,
        "digest": stored.digest,
        "tenant": adapter.tenant,
        "public": adapter.public,
        "rank": stored.rank,
        "alpha": stored.alpha,
        "targets": list(stored.targets),
        "modules": stored.modules,
        "bytes": stored.bytes,
        "tags": list(adapter.tags),
        "description": adapter.description,
        "pinned": adapter.pinned,
        "residency": shown.residency,
        "leases": shown.leases,
        "requests": adapter.requests,
        "created": adapter.created,
        "last_used": adapter.last_used,
        "revisions": [answers.Revision(digest=each.digest, created=each.created) for each in adapter.revisions],
        "recipe": adapter.recipe if shown.is_own else None,
    }
