"""/admin/v1/route and /admin/v1/routers."""

from dataclasses import asdict, replace
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from adapters_store.types import Composition
from routing.router import AUTO, RouteError, RouteQuery
from server.admin import answers
from server.admin.access import get_admin, no_query
from server.admin.queries import TenantQuery
from server.admin.router_body import RegisterRouterRequest, RouteRequest, router_schema, taken_router
from server.admin.tenants import tenant_answer
from server.answers import REFUSALS, RouteAnswer
from server.body import document, json_body, schema_of
from server.catalog import tenant_of
from server.deps import CallerDep, ServicesDep, check_not_draining, count_request, get_caller
from server.generation import route_error
from server.query_text import QueryScope, of_messages
from server.route_view import explained
from server.routers import RouterState

router = APIRouter(prefix="/admin/v1", dependencies=[Depends(get_caller)], responses=REFUSALS)

RouteBody = Annotated[RouteRequest, Depends(json_body(RouteRequest))]


@router.post(
    "/route",
    response_model=RouteAnswer,
    response_model_exclude_unset=True,
    summary="Choose adapters, without generating",
    dependencies=[Depends(count_request), Depends(no_query)],
    openapi_extra=document(RouteRequest),
)
async def route(body: RouteBody, services: ServicesDep, caller: CallerDep) -> dict[str, Any]:
    """What a request with this prompt would use, with the scores of all adapters that the tenant may use."""
    tenant = tenant_of(caller, body.tenant)
    known = await services.accounts.tenant(tenant)
    query = RouteQuery(
        tenant=tenant,
        model=AUTO,
        composition=Composition(body.composition or "mixture"),
        router=body.router,
        text=_text(body),
        options=body.router_options(explain=True),
        default_router=known.default_router,
    )
    try:
        return explained(await services.generator.routers.route(query))
    except RouteError as error:
        raise route_error(error) from error


@router.get(
    "/routers",
    response_model=answers.RouterList,
    summary="List routers",
    dependencies=[Depends(get_admin), Depends(no_query)],
)
async def list_routers(services: ServicesDep) -> answers.RouterList:
    """The one that needs no training, `retriever`, and the trained ones."""
    return answers.RouterList(data=[_shown(state) for state in services.routers.states()])


@router.get(
    "/routers/{name}",
    response_model=answers.Router,
    summary="Show a router",
    dependencies=[Depends(get_admin), Depends(no_query)],
)
async def get_router(name: str, services: ServicesDep) -> answers.Router:
    """How it was trained, and whether it is served."""
    return _shown(services.routers.state(name))


@router.post(
    "/routers",
    status_code=HTTPStatus.CREATED,
    response_model=answers.Router,
    summary="Register a trained router",
    dependencies=[Depends(get_admin), Depends(no_query), Depends(check_not_draining)],
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": schema_of(RegisterRouterRequest)},
                "multipart/form-data": {"schema": router_schema()},
            },
        }
    },
)
async def register_router(request: Request, services: ServicesDep, caller: CallerDep) -> answers.Router:
    """A folder that `loramux train retriever` or `train meteora` wrote: from a `source` (JSON), or its two files or one
    archive.

    It is served at once. For a retriever every adapter gets prototypes, without which it cannot be chosen: the answer
    waits ten seconds for them at most. A token-level router needs the adapters that it was trained for.
    """
    async with services.store.staging() as staging, taken_router(request, staging, services, caller) as taken:
        return _shown(await services.routers.add(taken.name, taken.folder, replace=taken.replace))


@router.delete(
    "/routers/{name}",
    response_model=answers.RouterRemoval,
    summary="Delete a trained router",
    dependencies=[Depends(get_admin), Depends(no_query)],
)
async def delete_router(name: str, services: ServicesDep) -> answers.RouterRemoval:
    """Tenants whose default it was get the server's default."""
    await services.routers.remove(name)
    await services.accounts.refresh()
    return answers.RouterRemoval(name=name)


@router.post(
    "/routers/{name}/default",
    response_model=answers.Tenant,
    summary="Make a router a tenant's default",
    dependencies=[Depends(get_admin)],
)
async def make_default(
    name: str, query: Annotated[TenantQuery, Query()], services: ServicesDep, caller: CallerDep
) -> answers.Tenant:
    """From now on the model `auto` means this router for the tenant, by default the built-in one."""
    services.routers.state(name)
    tenant = tenant_of(caller, query.tenant)
    return tenant_answer(await services.accounts.update_tenant(tenant, lambda row: replace(row, default_router=name)))


def _text(body: RouteRequest) -> str:
    if body.messages is None:
        return body.prompt or ""
    messages = tuple(message.model_dump() for message in body.messages)
    return of_messages(messages, QueryScope(body.query or "last_turn"))


def _shown(state: RouterState) -> answers.Router:
    meta = state.row.meta if state.row is not None else {}
    return answers.Router(
        name=state.name,
        kind=state.kind,
        mode=str(meta["mode"]) if "mode" in meta else None,
        encoder=state.encoder,
        min_score=state.min_score,
        adapters=state.adapters,
        members=[answers.RouterMember(**asdict(member)) for member in state.members] if state.members else None,
        stale=state.problem is not None,
        problem=state.problem,
        training=dict(meta["training"]) if isinstance(meta.get("training"), dict) else None,  # type: ignore[call-overload]
        created=state.row.created if state.row is not None else None,
    )
