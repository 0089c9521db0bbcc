"""A server with an administrator and tenants, and adapters to upload."""

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fakes import Harness, write_adapter

Json = dict[str, Any]
ADMIN_KEY = "boss"
MEMBER_KEY = "member"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass
class World:
    """`admin` has the admin key, `member` a key of the built-in tenant, `a` and `b` are tenants."""

    harness: Harness
    folder: Path
    admin: httpx.AsyncClient
    member: httpx.AsyncClient
    a: httpx.AsyncClient
    b: httpx.AsyncClient
    nobody: httpx.AsyncClient

    def make(self, seed: int) -> Path:
        """An adapter of rank 2 on q_proj; each seed gives another one."""
        folder = self.folder / f"made-{seed}"
        if not folder.exists():
            write_adapter(folder, seed)
        return folder

    async def upload(
        self, client: httpx.AsyncClient, name: str, folder: Path | int = 0, **fields: object
    ) -> httpx.Response:
        folder = self.make(folder) if isinstance(folder, int) else folder
        return await client.post("/admin/v1/adapters", data=form(name=name, **fields), files=files_of(folder))

    async def added(self, client: httpx.AsyncClient, name: str, folder: Path | int = 0, **fields: object) -> Json:
        response = await self.upload(client, name, folder, **fields)
        assert response.status_code == 201, response.text
        answer: Json = response.json()
        return answer

    async def use(self, client: httpx.AsyncClient, model: str) -> httpx.Response:
        return await client.post("/v1/completions", json={"model": model, "prompt": "Hi", "max_tokens": 3})

    def staged(self) -> list[Path]:
        """What uploads have left behind."""
        return list((self.folder / "store").glob("run-*/staging/*"))


def form(**fields: object) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}


def files_of(folder: Path) -> dict[str, tuple[str, bytes]]:
    found = {"config": folder / CONFIG, "weights": folder / WEIGHTS}
    return {field: (path.name, path.read_bytes()) for field, path in found.items() if path.is_file()}


@contextlib.asynccontextmanager
async def open_world(harness: Harness, folder: Path) -> AsyncIterator[World]:
    async with contextlib.AsyncExitStack() as stack:

        async def client(key: str | None) -> httpx.AsyncClient:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return await stack.enter_async_context(harness.client(headers=headers))

        admin = await client(ADMIN_KEY)
        keys = []
        for tenant in ("a", "b"):
            assert (await admin.post("/admin/v1/tenants", json={"id": tenant})).status_code == 201
            keys.append((await admin.post(f"/admin/v1/tenants/{tenant}/keys")).json()["key"])
        yield World(
            harness,
            folder,
            admin,
            await client(MEMBER_KEY),
            await client(keys[0]),
            await client(keys[1]),
            await client(None),
        )


def error_of(response: httpx.Response) -> Json:
    """The error, which has OpenAI's form and names no file."""
    error: Json = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "/tmp" not in error["message"]
    assert "Traceback" not in error["message"]
    return error
