"""Adapters that come, change and go, everybody's and one tenant's own."""

import random
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import httpx

from loadtests.soak.faults import Fault
from loadtests.soak.refusal import code_of
from loadtests.soak.seen import Seen
from loadtests.soak.told import Told
from loadtests.upload import PARTS

PUBLIC, PRIVATE = "soak-", "private-"
"""What names begin with."""
MOST_NAMES = 12


class AdapterFaults:
    """Changes names by the admin's client, or by their owner's, among the adapters in `folders` (by digest).

    `fixed` names are left alone.
    """

    def __init__(
        self,
        admin: httpx.AsyncClient,
        owner: httpx.AsyncClient,
        folders: Mapping[str, Path],
        told: Told,
        seen: Seen,
        seed: int,
        fixed: frozenset[str] = frozenset(),
    ) -> None:
        self.use(admin, owner)
        self._fixed = fixed
        self._folders = folders
        self._told = told
        self._seen = seen
        self._rng = random.Random(seed)
        self._number = 0

    def kinds(self) -> dict[str, tuple[float, Fault]]:
        """Faults by name, with weights."""
        return {
            "adapter registered": (4.0, self.register),
            "adapter replaced": (3.0, self.replace),
            "adapter deleted": (3.0, self.delete),
        }

    def use(self, admin: httpx.AsyncClient, owner: httpx.AsyncClient) -> None:
        """These clients from now on."""
        self._admin, self._owner = admin, owner

    async def register(self) -> str:
        await self.settle()
        if len(self._changing()) >= MOST_NAMES:
            return await self.delete()
        self._number += 1
        return await self._put(f"{self._rng.choice((PUBLIC, PRIVATE))}{self._number}", replace=False)

    async def replace(self) -> str:
        await self.settle()
        names = self._changing()
        return await self._put(self._rng.choice(names), replace=True) if names else await self.register()

    async def delete(self) -> str:
        await self.settle()
        names = self._changing()
        return await self._delete(self._rng.choice(names)) if names else await self.register()

    async def settle(self) -> None:
        """Ask what became of changes that were not answered well."""
        for name in self._told.uncertain():
            answer = await self._client(name).get(f"/admin/v1/adapters/{name}")
            if answer.status_code in (200, 404):
                digest = answer.json()["digest"] if answer.is_success else None
                if not self._told.says(name, digest):
                    self._seen.breaks(f"{name} means {digest}, which nobody asked for")

    async def verify(self) -> None:
        """Everything is as it was told."""
        await self.settle()
        for name in self._told.uncertain():
            self._seen.breaks(f"the server does not say what {name} means")
        for name, digest in self._told.certain().items():
            answer = await self._client(name).get(f"/admin/v1/adapters/{name}")
            found = answer.json().get("digest") if answer.is_success else answer.status_code
            if found != digest:
                self._seen.breaks(f"{name} was {digest[:12]}, and is {found}")
        for name in self._told.gone():
            answer = await self._client(name).get(f"/admin/v1/adapters/{name}")
            if answer.status_code != httpx.codes.NOT_FOUND:
                self._seen.breaks(f"{name} was deleted, and answers {answer.status_code}")

    async def clean(self) -> None:
        """Delete what is there."""
        for name in self._changing():
            await self._delete(name)

    def _changing(self) -> list[str]:
        return sorted(self._told.certain().keys() - self._fixed)

    async def _put(self, name: str, *, replace: bool) -> str:
        digest, folder = self._rng.choice(sorted(self._folders.items()))
        self._told.tries(name, digest)
        with ExitStack() as opened:
            files = {part: opened.enter_context((folder / file).open("rb")) for part, file in PARTS.items()}
            public = {"public": "true"} if name.startswith(PUBLIC) else {}
            fields = {"name": name, "replace": str(replace).lower(), **public}
            answer = await self._client(name).post("/admin/v1/adapters", data=fields, files=files)
        if answer.is_success:
            self._told.says(name, digest)
            if answer.json()["digest"] != digest:
                self._seen.breaks(f"{name} was registered as {answer.json()['digest']}, expected {digest}")
        return self._outcome(answer)

    async def _delete(self, name: str) -> str:
        self._told.tries(name, None)
        answer = await self._client(name).delete(f"/admin/v1/adapters/{name}")
        if answer.is_success:
            self._told.says(name, None)
        return self._outcome(answer)

    def _client(self, name: str) -> httpx.AsyncClient:
        return self._owner if name.startswith(PRIVATE) else self._admin

    def _outcome(self, answer: httpx.Response) -> str:
        if answer.is_success:
            return "done"
        code = code_of(answer)
        if answer.status_code != 503 or "retry-after" not in answer.headers:
            self._seen.breaks(f"a change of an adapter was refused: {answer.status_code} {answer.text[:200]}")
        return f"refused: {code}"
