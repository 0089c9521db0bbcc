"""/admin/v1/usage, /state and /drain."""

import asyncio
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Depends, Query

from adapters_store.registry import InvalidValue, UsageRow
from server.admin import answers
from server.admin.access import get_admin, no_query
from server.admin.protocol import NoFields
from server.admin.queries import UsageQuery
from server.answers import REFUSALS
from server.body import document, json_body
from server.catalog import tenant_of
from server.deps import CallerDep, ServicesDep, ServingMember, count_request, get_caller
from server.errors import refusal

router = APIRouter(prefix="/admin/v1", dependencies=[Depends(get_caller), Depends(count_request)], responses=REFUSALS)

NoBody = Annotated[NoFields, Depends(json_body(NoFields, optional=True))]


@router.get("/usage", response_model=answers.UsageList, summary="Show usage")
async def usage(query: Annotated[UsageQuery, Query()], services: ServicesDep, caller: CallerDep) -> answers.UsageList:
    """Requests and tokens by day, tenant and adapter; a mix counts under its own label, such as `german+sql`.

    A tenant's key sees its own, the admin key everybody's or, with `tenant`, one tenant's.
    """
    tenant = query.tenant
    if not caller.admin or tenant is not None:
        tenant = tenant_of(caller, tenant)
    await services.usage.catch_up()
    try:
        page = await asyncio.to_thread(
            services.store.registry.ledger.read,
            tenant,
            since=query.since,
            until=query.until,
            limit=query.limit,
            cursor=query.cursor,
        )
    except InvalidValue as error:
        raise refusal(error, "cursor") from error
    return answers.UsageList(data=[_line(row) for row in page.items], next=page.next)


@router.get(
    "/state",
    response_model=answers.State,
    summary="Show what the server does",
    dependencies=[Depends(get_admin), Depends(no_query)],
)
async def state(services: ServicesDep) -> answers.State:
    """Running and waiting sequences, ages of the oldest requests, memory of each engine; all of this moment."""
    now = await services.processes.state()
    engines = [_engine(str(number), member) for number, member in enumerate(services.engine.members)]
    return answers.State(
        draining=services.generator.is_draining,
        requests=now.requests,
        running=sum(engine.running for engine in engines),
        waiting=sum(engine.waiting for engine in engines),
        oldest_waiting_seconds=now.oldest_waiting,
        oldest_running_seconds=now.oldest_running,
        uploads=now.uploads,
        engines=engines,
        uptime_seconds=services.now() - services.started,
    )


@router.post(
    "/drain",
    status_code=HTTPStatus.ACCEPTED,
    response_model=answers.Drain,
    summary="Take no new requests",
    dependencies=[Depends(get_admin), Depends(no_query)],
    openapi_extra=document(NoFields, required=False),
)
async def drain(_: NoBody, services: ServicesDep) -> answers.Drain:
    """What runs is finished; new requests are refused with 503 and `Retry-After`, and `/ready` says so."""
    return answers.Drain(running=await services.processes.drain())


def _engine(name: str, engine: ServingMember) -> answers.EngineState:
    stats, info = engine.stats, engine.info
    return answers.EngineState(
        id=name,
        alive=engine.alive,
        device=info.device if info is not None else None,
        dtype=info.dtype if info is not None else None,
        running=stats.running,
        waiting=stats.waiting,
        kv_blocks=stats.kv_blocks,
        kv_used_blocks=stats.kv_used_blocks,
        pages=dict(stats.pages),
        adapters={"host": stats.adapters_host, "device": stats.adapters_device},
        preemptions=stats.preemptions,
        memory=dict(info.memory) if info is not None else {},
    )


def _line(row: UsageRow) -> answers.UsageLine:
    return answers.UsageLine(
        tenant=row.tenant,
        adapter=row.adapter,
        day=row.day.isoformat(),
        requests=row.requests,
        prompt_tokens=row.prompt_tokens,
        generation_tokens=row.generation_tokens,
    )
