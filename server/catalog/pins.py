"""Adapters that stay on the device because an administrator said so."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from adapters_store.blobs import BlobError
from adapters_store.leases import NOBODY
from adapters_store.registry import Resolved
from adapters_store.store import AdapterStore, StoreLease, UnknownAdapter
from server.catalog.engine import TieredEngine
from server.engine.adapter_calls import EngineUnavailable
from server.engine.config import RequestError

logger = logging.getLogger(__name__)

NOT_NOW = (UnknownAdapter, BlobError, EngineUnavailable, RequestError)
"""Why an adapter that has a name may not be pinned, beside a lack of room."""


@dataclass(frozen=True)
class _Pin:
    digest: str
    lease: StoreLease


class Pins:
    """The pinned names, each with a lease on its adapter's folder. One change at a time.

    Raises what `AdapterStore.lease` and the engine client raise.
    """

    def __init__(self, store: AdapterStore, engine: TieredEngine) -> None:
        self._store = store
        self._engine = engine
        self._pins: dict[tuple[str, str], _Pin] = {}
        self._changing = asyncio.Lock()
        self._unwanted: set[tuple[str, str]] = set()
        self._without_room: set[tuple[str, str, str]] = set()

    def has(self, owner: str, name: str) -> bool:
        return (owner, name) in self._pins

    async def try_out(self, digest: str, path: str) -> bool:
        """Whether an adapter that has no name yet can be pinned. If so, `pin` or `forget` has to follow."""
        async with self._changing:
            return self._is_pinned(digest) or await self._engine.pin(digest, path)

    async def forget(self, digest: str) -> None:
        """The adapter that was tried out gets no name."""
        async with self._changing:
            self._unpin_unnamed(digest)

    async def pin(self, adapter: Resolved) -> bool:
        """Pin a name to its adapter, instead of the one that it had before; False if there is no room."""
        key = (adapter.tenant, adapter.name)
        async with self._changing:
            old = self._pins.get(key)
            if old is not None and old.digest == adapter.digest:
                return True
            lease = await self._store.lease(NOBODY, [adapter])
            try:
                fits = await self._pin(adapter.digest, lease.paths[adapter.digest], old)
            except BaseException:
                self._store.release(lease)
                raise
            if not fits:
                self._store.release(lease)
                return False
            self._pins[key] = _Pin(adapter.digest, lease)
            if old is not None:
                self._store.release(old.lease)
                self._unpin_unnamed(old.digest)
            return True

    async def keep(self, adapter: Resolved) -> bool:
        """`pin` for what is registered already: that is not undone because an engine restarts, but logged."""
        reason = await self._problem(adapter)
        if reason is not None:
            logger.warning("adapter %r of tenant %r is not pinned: %s", adapter.name, adapter.tenant, reason)
        return reason is None

    async def unpin(self, owner: str, name: str) -> None:
        async with self._changing:
            pin = self._pins.pop((owner, name), None)
            if pin is not None:
                self._store.release(pin.lease)
                self._unpin_unnamed(pin.digest)

    async def follow(self, pinned: Sequence[Resolved]) -> None:
        """Pin what another process has pinned, and unpin what it has unpinned: these are all that the registry knows.

        A pin that the registry does not know may be about to be told to it: it goes if it is not known the next time
        either.
        """
        wanted = {(adapter.tenant, adapter.name): adapter for adapter in pinned}
        unwanted = self._pins.keys() - wanted.keys()
        for owner, name in unwanted & self._unwanted:
            await self.unpin(owner, name)
            self._without_room.clear()
        self._unwanted = unwanted - self._unwanted
        for key, adapter in wanted.items():
            pin, this = self._pins.get(key), (*key, adapter.digest)
            if this in self._without_room or (pin is not None and pin.digest == adapter.digest):
                continue
            reason = await self._problem(adapter)
            if reason is not None and not isinstance(reason, EngineUnavailable):  # that one is back soon
                logger.warning("adapter %r of tenant %r is not pinned: %s", adapter.name, adapter.tenant, reason)
                self._without_room.add(this)  # tried, and logged, once until another pin goes

    async def close(self) -> None:
        """Give the leases back; the registry knows what is pinned."""
        async with self._changing:
            for pin in self._pins.values():
                self._store.release(pin.lease)
            self._pins.clear()

    async def _problem(self, adapter: Resolved) -> object | None:
        """Why an adapter is not pinned, None when it is."""
        try:
            return None if await self.pin(adapter) else "no room"
        except NOT_NOW as error:
            return error

    async def _pin(self, digest: str, path: str, old: _Pin | None) -> bool:
        """Only if both do not fit together the old adapter makes room first, and comes back if that is not enough."""
        if self._is_pinned(digest) or await self._engine.pin(digest, path):
            return True
        if old is None or sum(pin.digest == old.digest for pin in self._pins.values()) > 1:
            return False
        self._engine.unpin(old.digest)
        if await self._engine.pin(digest, path):
            return True
        await self._engine.pin(old.digest, old.lease.paths[old.digest])
        return False

    def _is_pinned(self, digest: str) -> bool:
        return any(pin.digest == digest for pin in self._pins.values())

    def _unpin_unnamed(self, digest: str) -> None:
        if not self._is_pinned(digest):
            self._engine.unpin(digest)
