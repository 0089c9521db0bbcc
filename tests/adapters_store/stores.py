"""Stores over one registry and one set of blobs, and adapters for them that differ in alpha only."""

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from adapters_store.registry import Registration, Resolved, TenantRow
from adapters_store.store import AdapterStore, NewAdapter, StoreConfig
from adapters_store.types import LinearShape

BASE = "base-model"


class Clock:
    """Seconds since the epoch, which stand still until a test moves them."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


class Stores:
    """`write(alpha, name)` makes the folder of an adapter. Tenants `default`, `alice` and `bob`."""

    def __init__(self, config: StoreConfig, shape: LinearShape, write: Callable[[float, str], Path]) -> None:
        self.config = config
        self.shape = shape
        self.write = write
        self.clock = Clock()
        self._opened: list[AdapterStore] = []

    def open(self, **options: Any) -> AdapterStore:
        """One more process, as it were."""
        store = AdapterStore.open(self.shape, BASE, self.config, self.clock, reserved=[BASE], **options)
        for tenant in ("alice", "bob"):
            if tenant not in {row.id for row in store.registry.accounts.list().items}:
                store.registry.accounts.add(TenantRow(tenant))
        self._opened.append(store)
        return store

    async def add(self, store: AdapterStore, name: str, alpha: float, **options: Any) -> Registration:
        folder = self.write(alpha, f"sources/{alpha}")
        return await store.register(folder, NewAdapter(name, **options))

    async def close(self) -> None:
        for store in self._opened:
            store.check_integrity()
            await store.close()


async def meaning(store: AdapterStore, tenant: str, name: str) -> Resolved:
    return (await store.resolve(tenant, [name]))[name]


async def outcome(work: Awaitable[Any]) -> Any:
    """What it returns or raises."""
    try:
        return await work
    except Exception as error:
        return error
