"""Where adapters are, as far as each tenant may know: what another tenant's use brought there stays untold."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Tier = Literal["device", "host", "disk"]
Use = tuple[str, str, str]
"""(tenant, owner, name)"""


@dataclass
class _Since:
    """Since when an adapter has been in host memory or above, and since when on the device."""

    host: float
    device: float | None = None


class Residency:
    """The engine's tiers by digest, and who used what when. `clock` gives seconds; at most `max_uses` are remembered.

    A digest may have names of several tenants. A tenant is told of a tier only if it used the adapter, under that name,
    since the adapter came there: then its own use may have been what brought it.
    """

    def __init__(self, clock: Callable[[], float], max_uses: int = 100_000) -> None:
        self._clock = clock
        self._max_uses = max_uses
        self._since: dict[str, _Since] = {}
        self._uses: OrderedDict[Use, float] = OrderedDict()

    def moved(self, digest: str, tier: str) -> None:
        """The engine's news. An adapter that comes to a tier again has been elsewhere meanwhile."""
        now, since = self._clock(), self._since.get(digest)
        if tier == "disk":
            self._since.pop(digest, None)
        elif tier == "device":
            is_from_host = since is not None and since.device is None
            host = since.host if since is not None and is_from_host else now
            self._since[digest] = _Since(host, now)
        else:
            is_from_device = since is not None and since.device is not None
            self._since[digest] = _Since(since.host if since is not None and is_from_device else now)

    def used(self, tenant: str, owner: str, name: str) -> None:
        """A tenant used an adapter now, under the name `name` of `owner`."""
        key = (tenant, owner, name)
        self._uses[key] = self._clock()
        self._uses.move_to_end(key)
        if len(self._uses) > self._max_uses:
            self._uses.popitem(last=False)

    def last_used(self, tenant: str, owner: str, name: str) -> float | None:
        return self._uses.get((tenant, owner, name))

    def of(self, digest: str) -> Tier:
        """Where an adapter is."""
        since = self._since.get(digest)
        if since is None:
            return "disk"
        return "host" if since.device is None else "device"

    def told(self, digest: str, tenant: str, owner: str, name: str, *, in_use: bool) -> Tier:
        """Where a tenant may know it to be; `in_use`: it uses the name at this moment."""
        since = self._since.get(digest)
        used = self._clock() if in_use else self._uses.get((tenant, owner, name))
        if since is None or used is None:
            return "disk"
        if since.device is not None and used >= since.device:
            return "device"
        return "host" if used >= since.host else "disk"
