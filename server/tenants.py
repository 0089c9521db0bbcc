"""Who calls: keys become tenants."""

import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from adapters_store.registry import DEFAULT_TENANT as DEFAULT_ID
from adapters_store.registry import Quotas, TenantRow
from server.key_ring import KeyRing, looks_stored


@dataclass(frozen=True)
class Tenant:
    """Whose adapters, quotas and prefix cache a request uses. `weight` is its share of the engine beside others'.

    `default_router` is what the model `auto` means; None leaves it to the server.
    """

    id: str
    weight: float = 1.0
    quotas: Quotas = field(default_factory=Quotas)
    default_router: str | None = None

    @classmethod
    def of(cls, row: TenantRow) -> "Tenant":
        """The built-in tenant's quotas are unlimited, whatever is stored."""
        return cls(row.id, row.weight, Quotas() if row.id == DEFAULT_ID else row.quotas, row.default_router)

    @property
    def salt(self) -> bytes:
        """Enters the root of the prefix cache: KV is shared only under equal salts, so never between tenants."""
        return self.id.encode()


@dataclass(frozen=True)
class Caller:
    """One authenticated request. `admin` may do what concerns all tenants."""

    tenant: Tenant
    admin: bool = False


DEFAULT_TENANT = Tenant(DEFAULT_ID)


class Tenants:
    """The tenants as last read from the registry, by id. The built-in one is always there."""

    def __init__(self) -> None:
        self._known = {DEFAULT_ID: DEFAULT_TENANT}

    @property
    def default(self) -> Tenant:
        return self._known[DEFAULT_ID]

    def get(self, tenant: str) -> Tenant | None:
        return self._known.get(tenant)

    def replace(self, rows: Iterable[TenantRow]) -> None:
        self._known = {DEFAULT_ID: DEFAULT_TENANT} | {row.id: Tenant.of(row) for row in rows}

    def put(self, row: TenantRow) -> None:
        self._known[row.id] = Tenant.of(row)

    def drop(self, tenant: str) -> None:
        self._known.pop(tenant, None)


class Keys:
    """The keys of the settings, which belong to the built-in tenant, and beside them those stored for tenants.

    Without a key in the settings the server is open: a stored key still means its tenant, so that tenants can be tried
    on one's own machine, and everybody else is the admin. What looks like a stored key but is none, or is revoked, is
    nobody's in any case: a tenant does not become the admin by losing its key.
    """

    def __init__(
        self,
        api_keys: Sequence[str] = (),
        admin_key: str | None = None,
        metrics_key: str | None = None,
        stored: KeyRing | None = None,
        tenants: Tenants | None = None,
    ) -> None:
        self._api_keys = tuple(key.encode() for key in api_keys)
        self._admin_key = admin_key.encode() if admin_key else None
        self._metrics_key = metrics_key.encode() if metrics_key else None
        self._stored = stored or KeyRing()
        self._tenants = tenants or Tenants()

    @property
    def required(self) -> bool:
        return bool(self._api_keys or self._admin_key)

    async def caller(self, key: str | None) -> Caller | None:
        """Whose key this is; None if it is nobody's. Raises Unavailable as `KeyRing.owner` does."""
        if key is not None:
            caller = self._configured(key) or await self._tenant_of(key)
            if caller is not None:
                return caller
        if self.required or (key is not None and looks_stored(key)):
            return None
        return Caller(self._tenants.default, admin=True)

    def may_read_metrics(self, key: str | None) -> bool:
        """The admin key and the metrics key do; without any configured key everybody does."""
        if not self.required and self._metrics_key is None:
            return True
        if key is None:
            return False
        given = key.encode(errors="replace")
        known = [key for key in (self._admin_key, self._metrics_key) if key is not None]
        return any(hmac.compare_digest(given, key) for key in known)

    def _configured(self, key: str) -> Caller | None:
        given = key.encode(errors="replace")
        # Every key is compared, in constant time each: how long the answer takes tells nothing about them.
        is_admin = self._admin_key is not None and hmac.compare_digest(given, self._admin_key)
        known = [hmac.compare_digest(given, api_key) for api_key in self._api_keys]
        return Caller(self._tenants.default, admin=is_admin) if is_admin or any(known) else None

    async def _tenant_of(self, key: str) -> Caller | None:
        owner = await self._stored.owner(key)
        tenant = self._tenants.get(owner) if owner is not None else None
        return Caller(tenant) if tenant is not None else None
