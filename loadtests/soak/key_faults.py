"""Keys that are replaced while they are in use."""

import asyncio
import time

import httpx

from loadtests.soak.seen import Seen

REVOKED_SECONDS = 180.0
"""A revoked key must be refused by then; it takes half a second, and as long as the database is away."""


class Keys:
    """The key of one tenant. `current` is the one to use; `revoked` are those of before, from the attempt on."""

    def __init__(self, admin: httpx.AsyncClient, tenant: str, seen: Seen) -> None:
        self.current = ""
        self.revoked: set[str] = set()
        self._admin = admin
        self._tenant = tenant
        self._seen = seen
        self._id = ""

    async def make(self) -> bool:
        """A new key is the current one, unless it cannot be made now."""
        answer = await self._admin.post(f"/admin/v1/tenants/{self._tenant}/keys", json={})
        if answer.status_code == 503:
            return False
        found = answer.raise_for_status().json()
        self.current, self._id = found["key"], found["id"]
        return True

    async def rotate(self) -> str:
        """A new key, then the old one is revoked, and is refused from then on."""
        old, old_id = self.current, self._id
        if not await self.make():
            return "refused: no new key"
        self.revoked.add(old)
        answer = await self._admin.delete(f"/admin/v1/tenants/{self._tenant}/keys/{old_id}")
        if answer.status_code == 503:
            return "refused: not revoked"
        answer.raise_for_status()
        deadline = time.monotonic() + REVOKED_SECONDS
        while time.monotonic() < deadline:
            if (await self._admin.get("/v1/models", headers=bearer(old))).status_code == 401:
                return "done"
            await asyncio.sleep(0.1)
        self._seen.breaks("a revoked key is still taken")
        return "still taken"


def bearer(key: str) -> dict[str, str]:
    """The header that brings a key."""
    return {"Authorization": f"Bearer {key}"}
