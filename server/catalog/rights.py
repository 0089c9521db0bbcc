"""What a caller may do with adapters: a tenant's key what concerns its own tenant alone, the admin key everything."""

from dataclasses import replace

from adapters_store.registry import NamedAdapter
from adapters_store.store import NewAdapter
from server.catalog.records import Changes
from server.errors import Forbidden
from server.tenants import Caller

ADMINS = ("public", "pinned")
"""What only the administrator decides: the one draws other tenants' requests, the other takes memory from them."""


def tenant_of(caller: Caller, wanted: str | None) -> str:
    """Whose adapters a call is about. Raises Forbidden for another tenant's, whether or not there is one."""
    if wanted is None or wanted == caller.tenant.id:
        return caller.tenant.id
    if not caller.admin:
        raise Forbidden("tenant: a tenant's key reaches what is its own only", param="tenant")
    return wanted


def check_new(caller: Caller, new: NewAdapter) -> None:
    """Raises Forbidden for a new adapter that is not the caller's own or has what only the administrator gives."""
    tenant_of(caller, new.tenant)
    for field in ADMINS:
        if not caller.admin and getattr(new, field):
            raise Forbidden(f"{field}: only the admin key may decide it", param=field)


def as_allowed(caller: Caller, new: NewAdapter) -> NewAdapter:
    """A tenant's replacement of a pinned adapter may be of any size, and so does not inherit the pin.

    Nor does it replace what has become public meanwhile.
    """
    return new if caller.admin else replace(new, pinned=False, may_be_public=False)


def check_changes(caller: Caller, changes: Changes) -> None:
    """Raises Forbidden for changes that only the administrator makes."""
    for field in ADMINS:
        if not caller.admin and getattr(changes, field) is not None:
            raise Forbidden(f"{field}: only the admin key may decide it", param=field)


def check_change(caller: Caller, adapter: NamedAdapter) -> None:
    """Raises Forbidden for an adapter that others use, whosever it is."""
    if adapter.public and not caller.admin:
        raise Forbidden("the adapter is public: only the admin key may change what others use")
