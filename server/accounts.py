"""Tenants and their keys, as administrators change them and as requests see them."""

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import ParamSpec, TypeVar

from adapters_store.registry import DEFAULT_TENANT as DEFAULT_ID
from adapters_store.registry import Accounts, InvalidValue, KeyRow, Page, Quotas, RegistryUnavailable, TenantRow
from adapters_store.threads import Threads
from server.key_ring import KeyRing, make_key
from server.tenants import Tenants

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 0.5
"""Between two looks at the registry: what another process changed counts within a second."""
LEAST_SHARE, LARGEST_SHARE = 1e-3, 1e3
"""Bounds of tenants' weights: a million tokens of one for each of another is as good as none."""
PAGE = 1000
THREADS = 4

P = ParamSpec("P")
T = TypeVar("T")


class AccountService:
    """The registry's accounts; what requests need of them is in `known` and `ring`.

    Own changes are there at once, other processes' after the next `refresh`. While the registry is unavailable what
    was known last stays. Every method raises RegistryError as the registry's own does. `token_bytes(n)` gives n bytes
    that nobody can guess.
    """

    def __init__(self, accounts: Accounts, known: Tenants, ring: KeyRing, token_bytes: Callable[[int], bytes]) -> None:
        self._accounts = accounts
        self._known = known
        self._ring = ring
        self._token_bytes = token_bytes
        # A refresh that has read the registry before a change must not be applied after it.
        self._changing = asyncio.Lock()
        self._is_available = True
        self._version: str | None = None
        # Threads of its own: what waits for a lost database must not keep requests from theirs.
        self._threads = Threads(THREADS, "accounts")

    def close(self) -> None:
        """No calls after this one."""
        self._threads.shutdown(wait=False)

    def load(self) -> None:
        """Read everything, at the start. Raises RegistryUnavailable."""
        self._apply(self._read())

    async def refresh(self) -> None:
        """Read everything again if anything has changed; without the registry all stays as it is."""
        async with self._changing:
            try:
                self._apply(await self._run(self._read))
            except RegistryUnavailable as error:
                self._note(False, f"tenants and keys stay as they were: {error}")
            else:
                self._note(True, "tenants and keys are read again")

    async def create_tenant(self, tenant: TenantRow) -> TenantRow:
        """Raises InvalidValue, NameTaken."""
        check_tenant(tenant)
        async with self._changing:
            stored = await self._run(self._accounts.add, tenant)
            self._known.put(stored)
        return stored

    async def tenant(self, tenant: str) -> TenantRow:
        """Raises NotFound."""
        return await self._run(self._accounts.get, tenant)

    async def tenants(self, *, limit: int = 100, cursor: str | None = None) -> Page[TenantRow]:
        """All tenants by id."""
        return await self._run(self._accounts.list, limit=limit, cursor=cursor)

    async def update_tenant(self, tenant: str, change: Callable[[TenantRow], TenantRow]) -> TenantRow:
        """Replace a tenant's row by `change` of it, which runs in a thread. Raises NotFound, InvalidValue."""

        def checked(row: TenantRow) -> TenantRow:
            changed = change(row)
            check_tenant(changed)
            return changed

        async with self._changing:
            stored = await self._run(self._accounts.update, tenant, checked)
            self._known.put(stored)
        return stored

    async def remove_tenant(self, tenant: str) -> None:
        """Its keys end with it. Raises NotFound, InvalidValue for the built-in one, `tenant_in_use` with adapters."""
        async with self._changing:
            await self._run(self._accounts.remove, tenant)
            self._ring.drop_tenant(tenant)
            self._known.drop(tenant)

    async def create_key(self, tenant: str, label: str = "") -> tuple[KeyRow, str]:
        """What is stored, and the key itself, which nobody can tell afterwards. Raises NotFound, InvalidValue."""
        row, key = await self._run(make_key, tenant, label, self._token_bytes)
        async with self._changing:
            stored = await self._run(self._accounts.add_key, row)
            self._ring.put(stored)
        return stored, key

    async def keys(self, tenant: str) -> tuple[KeyRow, ...]:
        """All keys of a tenant, revoked ones too, oldest first. Raises NotFound."""
        await self.tenant(tenant)
        return await self._run(self._accounts.keys, tenant)

    async def revoke_key(self, tenant: str, key_id: str) -> KeyRow:
        """Its next request is refused. Raises NotFound."""
        async with self._changing:
            stored = await self._run(self._accounts.revoke_key, tenant, key_id)
            self._ring.drop(key_id)
        return stored

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(work, *args, **kwargs))

    def _read(self) -> "_Snapshot | None":
        """All accounts, or None if they are as last time: a thousand tenants and keys take 40 ms, their version 1."""
        version = self._accounts.version()
        if version == self._version:
            return None
        # Read after its version: what changes in between is read again next time.
        page = self._accounts.list(limit=PAGE)
        tenants = list(page.items)
        while page.next is not None:
            page = self._accounts.list(limit=PAGE, cursor=page.next)
            tenants += page.items
        return _Snapshot(version, tenants, self._accounts.active_keys())

    def _apply(self, snapshot: "_Snapshot | None") -> None:
        if snapshot is not None:
            self._known.replace(snapshot.tenants)
            self._ring.replace(snapshot.keys)
            self._version = snapshot.version

    def _note(self, is_available: bool, message: str) -> None:
        """One line of the log when the registry goes, one when it is back."""
        if is_available != self._is_available:
            self._is_available = is_available
            logger.log(logging.INFO if is_available else logging.WARNING, message)


@dataclass(frozen=True)
class _Snapshot:
    """The registry's accounts, of this version or later."""

    version: str
    tenants: Sequence[TenantRow]
    keys: Sequence[KeyRow]


def check_tenant(tenant: TenantRow) -> None:
    """Raises InvalidValue for a weight or quotas that mean nothing."""
    if not LEAST_SHARE <= tenant.weight <= LARGEST_SHARE:  # nor is NaN
        raise InvalidValue(f"weight: expected a number from {LEAST_SHARE} to {LARGEST_SHARE:g}, got {tenant.weight}")
    quotas = tenant.quotas
    if tenant.id == DEFAULT_ID and quotas != Quotas():
        raise InvalidValue(f"quotas: those of the built-in tenant {DEFAULT_ID!r} are unlimited, expected none")
    rate = quotas.requests_per_second
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise InvalidValue(f"quotas.requests_per_second: expected a number above 0, got {rate}")
    for name in (each.name for each in fields(Quotas)):
        value = getattr(quotas, name)
        least = 1 if name == "tokens_per_minute" else 0
        if value is not None and value < least:
            raise InvalidValue(f"quotas.{name}: expected at least {least}, got {value}")
