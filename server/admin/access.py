"""Who may call what on the admin surface, and what all of its endpoints share."""

from typing import Annotated

from fastapi import Depends, Query

from server.admin.queries import NoQuery
from server.deps import CallerDep, ServicesDep
from server.errors import Forbidden
from server.tenants import Caller


async def get_admin(caller: CallerDep) -> Caller:
    """Raises Forbidden for a tenant's key."""
    if not caller.admin:
        raise Forbidden("this needs the admin key")
    return caller


AdminDep = Annotated[Caller, Depends(get_admin)]


async def no_query(_: Annotated[NoQuery, Query()]) -> None:
    """Refuses every query parameter."""


async def flush_usage(services: ServicesDep, _: CallerDep) -> None:
    """What has been used up to now is in the registry, unless that is unavailable."""
    await services.usage.catch_up()


COUNTED = (Depends(flush_usage),)
"""Dependencies of endpoints that show counters."""
