"""Who calls: keys become tenants."""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tenant:
    """Whose adapters, quotas and prefix cache a request uses. KV is shared only under equal salts."""

    id: str
    salt: bytes = b""


@dataclass(frozen=True)
class Caller:
    """One authenticated request. `admin` may do what concerns all tenants."""

    tenant: Tenant
    admin: bool = False


DEFAULT_TENANT = Tenant("default")


class Keys:
    """The keys of the settings. All of them belong to the built-in tenant; without any, everybody is its admin."""

    def __init__(
        self, api_keys: Sequence[str] = (), admin_key: str | None = None, metrics_key: str | None = None
    ) -> None:
        self._api_keys = tuple(key.encode() for key in api_keys)
        self._admin_key = admin_key.encode() if admin_key else None
        self._metrics_key = metrics_key.encode() if metrics_key else None

    @property
    def required(self) -> bool:
        return bool(self._api_keys or self._admin_key)

    def caller(self, key: str | None) -> Caller | None:
        """Whose key this is; None if it is nobody's."""
        if not self.required:
            return Caller(DEFAULT_TENANT, admin=True)
        if key is None:
            return None
        given = key.encode(errors="replace")
        # Every key is compared, in constant time each: how long the answer takes tells nothing about them.
        is_admin = self._admin_key is not None and hmac.compare_digest(given, self._admin_key)
        known = [hmac.compare_digest(given, api_key) for api_key in self._api_keys]
        return Caller(DEFAULT_TENANT, admin=is_admin) if is_admin or any(known) else None

    def may_read_metrics(self, key: str | None) -> bool:
        """The admin key and the metrics key do; without any configured key everybody does."""
        if not self.required and self._metrics_key is None:
            return True
        if key is None:
            return False
        given = key.encode(errors="replace")
        known = [key for key in (self._admin_key, self._metrics_key) if key is not None]
        return any(hmac.compare_digest(given, key) for key in known)
