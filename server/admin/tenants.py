"""/admin/v1/tenants and their keys."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Depends, Query

from adapters_store.registry import KeyRow, Quotas, RegistryError, TenantRow
from server.admin import answers
from server.admin.access import get_admin, no_query
from server.admin.protocol import KeyRequest, QuotaFields, TenantPatch, TenantRequest
from server.admin.queries import PageQuery
from server.answers import REFUSALS
from server.body import document, json_body
from server.deps import Services, ServicesDep
from server.errors import NotFound, refusal
from server.routers import RETRIEVER

router = APIRouter(prefix="/admin/v1/tenants", dependencies=[Depends(get_admin)], responses=REFUSALS)

ABOUT_ID = frozenset({"invalid_name", "tenant_exists", "tenant_not_found", "tenant_in_use"})
"""Codes of errors that are about the tenant's id, in the body or in the path."""

TenantBody = Annotated[TenantRequest, Depends(json_body(TenantRequest))]
PatchBody = Annotated[TenantPatch, Depends(json_body(TenantPatch))]
KeyBody = Annotated[KeyRequest, Depends(json_body(KeyRequest, optional=True))]


@router.post(
    "",
    status_code=HTTPStatus.CREATED,
    response_model=answers.Tenant,
    summary="Create a tenant",
    dependencies=[Depends(no_query)],
    openapi_extra=document(TenantRequest),
)
async def create_tenant(body: TenantBody, services: ServicesDep) -> answers.Tenant:
    """A tenant sees its own adapters and the public ones. Quotas that are absent are unlimited."""
    _check_router(services, body.default_router)
    row = TenantRow(body.id, body.weight, Quotas(**body.quotas.model_dump()), body.default_router)
    with _about_id():
        return tenant_answer(await services.accounts.create_tenant(row))


@router.get("", response_model=answers.TenantList, summary="List tenants")
async def list_tenants(query: Annotated[PageQuery, Query()], services: ServicesDep) -> answers.TenantList:
    """All of them by id; the built-in one is `default`."""
    page = await services.accounts.tenants(limit=query.limit, cursor=query.cursor)
    return answers.TenantList(data=[tenant_answer(row) for row in page.items], next=page.next)


@router.get("/{id}", response_model=answers.Tenant, summary="Show a tenant", dependencies=[Depends(no_query)])
async def get_tenant(id: str, services: ServicesDep) -> answers.Tenant:
    """Its weight, quotas and default router."""
    with _about_id():
        return tenant_answer(await services.accounts.tenant(id))


@router.patch(
    "/{id}",
    response_model=answers.Tenant,
    summary="Change a tenant",
    dependencies=[Depends(no_query)],
    openapi_extra=document(TenantPatch),
)
async def change_tenant(id: str, body: PatchBody, services: ServicesDep) -> answers.Tenant:
    """What the body names changes, the rest stays. A quota that is null becomes unlimited."""
    _check_router(services, body.default_router)
    with _about_id():
        return tenant_answer(await services.accounts.update_tenant(id, lambda row: _changed(row, body)))


@router.delete("/{id}", response_model=answers.Removal, summary="Delete a tenant", dependencies=[Depends(no_query)])
async def delete_tenant(id: str, services: ServicesDep) -> answers.Removal:
    """With its keys; its usage stays on the ledger. 409 `tenant_in_use` while it has adapters."""
    with _about_id():
        await services.accounts.remove_tenant(id)
    return answers.Removal(id=id)


@router.post(
    "/{id}/keys",
    status_code=HTTPStatus.CREATED,
    response_model=answers.NewKey,
    summary="Create a key",
    dependencies=[Depends(no_query)],
    openapi_extra=document(KeyRequest, required=False),
)
async def create_key(id: str, body: KeyBody, services: ServicesDep) -> answers.NewKey:
    """This answer is the only one that shows the key: what is stored cannot be turned back into it."""
    with _about_id():
        row, key = await services.accounts.create_key(id, body.label)
    return answers.NewKey(**_key(row).model_dump(), key=key)


@router.get("/{id}/keys", response_model=answers.KeyList, summary="List keys", dependencies=[Depends(no_query)])
async def list_keys(id: str, services: ServicesDep) -> answers.KeyList:
    """Those of one tenant, revoked ones too, oldest first."""
    with _about_id():
        return answers.KeyList(data=[_key(row) for row in await services.accounts.keys(id)])


@router.delete(
    "/{id}/keys/{key_id}", response_model=answers.Key, summary="Revoke a key", dependencies=[Depends(no_query)]
)
async def revoke_key(id: str, key_id: str, services: ServicesDep) -> answers.Key:
    """Within a second no server that shares the registry takes it."""
    with _about_id():
        return _key(await services.accounts.revoke_key(id, key_id))


@contextmanager
def _about_id() -> Iterator[None]:
    """What concerns the tenant itself names the field `id`."""
    try:
        yield
    except RegistryError as error:
        if error.code not in ABOUT_ID:
            raise
        raise refusal(error, "id") from error


def _check_router(services: Services, name: str | None) -> None:
    """Raises NotFound for a router that nobody can ask for."""
    if name is not None and name != RETRIEVER and not services.routers.exists(name):
        message = f"default_router: there is no router {name!r}, expected {RETRIEVER!r} or a registered one"
        raise NotFound(message, param="default_router", code="router_not_found")


def _changed(row: TenantRow, body: TenantPatch) -> TenantRow:
    changed = row if body.weight is None else replace(row, weight=body.weight)
    if "default_router" in body.model_fields_set:
        changed = replace(changed, default_router=body.default_router)
    quotas = body.quotas or QuotaFields()
    given = quotas.model_dump(include=quotas.model_fields_set)
    return replace(changed, quotas=replace(changed.quotas, **given))


def tenant_answer(row: TenantRow) -> answers.Tenant:
    """A tenant as answers show it."""
    return answers.Tenant(
        id=row.id,
        weight=row.weight,
        quotas=answers.Quotas(**asdict(row.quotas)),
        default_router=row.default_router,
        created=row.created,
    )


def _key(row: KeyRow) -> answers.Key:
    return answers.Key(id=row.id, label=row.label, created=row.created, revoked=row.revoked)
