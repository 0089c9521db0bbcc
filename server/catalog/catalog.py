"""Registering, listing, changing, loading, merging and deleting adapters."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from adapters_store.peft_format import read_summary
from adapters_store.registry import NamedAdapter, NotFound, Page, QuotaExceeded, Registration, RegistryUnavailable
from adapters_store.sources import fetch
from adapters_store.store import AdapterInUse, AdapterStore, NewAdapter
from adapters_store.threads import Threads
from server.catalog.engine import TieredEngine, engine_errors
from server.catalog.pins import Pins
from server.catalog.records import Added, Changes, Policies, Recipe, Shown, resolved, revision_of
from server.catalog.residency import Residency
from server.catalog.rights import as_allowed, check_change, check_changes, check_new
from server.catalog.slots import Slots
from server.catalog.touched import Touched, touched
from server.errors import Conflict, Forbidden
from server.tenants import Caller

logger = logging.getLogger(__name__)

DELETE_SECONDS = 300.0
"""How long a deletion that waits waits at most."""
PAGE = 1000
MOST_PAGES = 10
"""Adapters of so many pages are looked at for one filtered page of a list."""
UNPINNED = "the name was pinned, its new adapter is not"
DELETED = "the name has been deleted meanwhile"

P = ParamSpec("P")
T = TypeVar("T")


class Catalog:
    """Adapters, managed. A tenant's key manages only what belongs to the tenant and is not public.

    `on_change` is awaited with tenant and name after every change of a name, before its answer.

    `uploads`: how many registrations and merges of tenants run at once. `on_rejection` hears of registrations beyond a
    quota: the tenant's id, `adapters` or `bytes`. `clock` counts seconds. Methods raise ServerError,
    AdapterError, BlobError and RegistryError.
    """

    def __init__(
        self, store: AdapterStore, engine: TieredEngine, policies: Policies, clock: Callable[[], float], uploads: int
    ) -> None:
        self.store = store
        self.policies = policies
        self.residency = Residency(clock)
        self.pins = Pins(store, engine)
        self.slots = Slots(uploads)
        self._engine = engine
        self._threads = Threads(uploads + 1, "upload")
        self.on_rejection: Callable[[str, str], None] | None = None
        self.on_change: Callable[[str, str], Awaitable[None]] = _nobody
        engine.on_residency = self.residency.moved
        store.on_gone.append(engine.evict)

    async def start(self) -> None:
        """Pin what is pinned; what does not fit any more is logged."""
        for adapter in await asyncio.to_thread(self.store.registry.pinned):
            await self.pins.keep(adapter)

    async def refresh(self) -> None:
        """Follow what other processes have pinned and unpinned; without the registry all stays as it is."""
        try:
            await self.pins.follow(await asyncio.to_thread(self.store.registry.pinned))
        except RegistryUnavailable as error:
            logger.warning("pins stay as they are: %s", error)

    async def close(self) -> None:
        """Give the pins' leases back. What is pinned stays so in the registry."""
        await self.pins.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Run what a registration does with its files."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(call, *args, **options))

    async def add_source(self, caller: Caller, new: NewAdapter, source: str) -> Added:
        """Register what lies at `source`, as far as the caller may read there."""
        check_new(caller, new)
        async with self.slots.take(caller), self.store.staging() as folder:
            await self.in_thread(fetch, source, folder, self.policies.of_caller(caller))
            return await self.add_folder(caller, new, folder)

    async def add_folder(self, caller: Caller, new: NewAdapter, folder: Path) -> Added:
        """Register the adapter in a folder that nobody else changes. The caller holds a slot."""
        check_new(caller, new)
        before = await self._before(caller, new)
        with self._counting_rejections(new.tenant):
            if not new.pinned:
                done = await self.store.register(folder, as_allowed(caller, new))
                return await self._added(caller, new, before, done, folder)
            # Whether there is room is known before anything is registered.
            digest = (await self.in_thread(read_summary, folder, self.store.shape)).digest
            with engine_errors():
                if not await self.pins.try_out(digest, str(folder)):
                    raise _no_room(new.name)
            try:
                done = await self.store.register(folder, replace(new, pinned=False))
                return await self._added(caller, new, before, done, folder)
            finally:
                await self.pins.forget(digest)

    async def merge(self, caller: Caller, new: NewAdapter, recipe: Recipe) -> Added:
        """Register an adapter made of several that the new one's tenant may use."""
        check_new(caller, new)
        async with self.slots.take(caller):
            before = await self._before(caller, new)
            new = as_allowed(caller, new)
            how = recipe.method, recipe.rank, recipe.density, recipe.seed
            with self._counting_rejections(new.tenant):
                done = await self.store.merge(new, recipe.entries, *how)
            lease = await self.store.lease(new.tenant, [resolved(done.adapter)])
            try:
                (path,) = lease.paths.values()
                return await self._added(caller, new, before, done, Path(path))
            finally:
                self.store.release(lease)

    async def get(self, caller: Caller, tenant: str, name: str) -> Shown:
        """What `name` means for a tenant, which may be a public adapter of another."""
        return self.show(caller, tenant, await self.store.names.get(tenant, name))

    async def page(
        self,
        caller: Caller,
        tenant: str,
        *,
        limit: int,
        cursor: str | None = None,
        tag: str | None = None,
        residency: str | None = None,
    ) -> Page[Shown]:
        """A tenant's own adapters by name. A part may have fewer than `limit` although others follow."""
        found: list[Shown] = []
        for _ in range(MOST_PAGES):
            size = limit if residency is None else PAGE
            page = await self.store.names.list(tenant, limit=size, cursor=cursor, tag=tag, own=True)
            for adapter in page.items:
                shown = self.show(caller, tenant, adapter)
                if residency in (None, shown.residency):
                    found.append(shown)
                    if len(found) == limit and adapter is not page.items[-1]:
                        return Page(tuple(found), adapter.name)
            cursor = page.next
            if cursor is None or residency is None or len(found) == limit:
                break
        return Page(tuple(found), cursor)

    async def change(self, caller: Caller, tenant: str, name: str, changes: Changes) -> Shown:
        """Change an own name; with a digest, move it to that revision."""
        check_changes(caller, changes)
        adapter = await self._own(caller, tenant, name)
        digest = revision_of(adapter, changes.digest)
        moves = digest != adapter.adapter.digest
        is_pinned = adapter.pinned and (caller.admin or not moves) if changes.pinned is None else changes.pinned
        if is_pinned and (changes.pinned or moves):
            await self._pin(tenant, name, digest)
        try:
            if settings := replace(changes, pinned=is_pinned if is_pinned != adapter.pinned else None).settings():
                adapter = await self.store.names.update(tenant, name, **settings, may_be_public=caller.admin)
            if moves:
                adapter = await self.store.names.roll_back(tenant, name, digest, may_be_public=caller.admin)
        except NotFound:
            await self.pins.unpin(tenant, name)
            raise
        except BaseException:
            await self._restore_pin(adapter)
            raise
        if not is_pinned:
            await self.pins.unpin(tenant, name)
        await self.on_change(tenant, name)
        return self.show(caller, tenant, adapter)

    async def prefetch(self, caller: Caller, tenant: str, name: str) -> Shown:
        """Bring an own adapter to the device, or as near to it as there is room."""
        adapter = await self._own(caller, tenant, name, for_change=False)
        digest = adapter.adapter.digest
        lease = await self.store.lease(tenant, [resolved(adapter)])
        try:
            with engine_errors():
                await self._engine.prefetch_now(digest, lease.paths[digest])
            self.residency.used(tenant, adapter.tenant, name)
        finally:
            self.store.release(lease)
        return self.show(caller, tenant, adapter)

    async def delete(self, caller: Caller, tenant: str, name: str, wait: bool | None) -> bool:
        """Take an own name from everybody at once. True: it is gone; False: when the last request on it has ended.

        `wait` True waits for that, also of a name that goes already; False raises AdapterInUse instead, and nothing has
        changed.
        """
        if self.store.is_deleting(tenant, name):
            return await self._deleted(tenant, name, wait)
        try:
            adapter = await self._own(caller, tenant, name)
        except NotFound:  # perhaps it is hidden because another process deletes it, or one that has ended did
            return await self._deleted(tenant, name, wait)
        await self.pins.unpin(tenant, name)  # its lease is not a use
        try:
            is_gone = await self.store.delete(tenant, name, False if wait is False else None)
        except (AdapterInUse, RegistryUnavailable):
            await self._restore_pin(adapter)
            raise
        await self.pins.unpin(tenant, name)  # somebody may have pinned it meanwhile; from now on nobody can
        await self.on_change(tenant, name)
        if is_gone or not wait:
            return is_gone
        try:
            return await self._deleted(tenant, name, wait)
        except NotFound:
            return True

    async def _deleted(self, tenant: str, name: str, wait: bool | None) -> bool:
        """`delete` for a name that nobody can use any more. Raises NotFound if nobody has it."""
        return await self.store.delete(tenant, name, wait, DELETE_SECONDS)

    def show(self, caller: Caller, tenant: str, adapter: NamedAdapter) -> Shown:
        """The adapter as `tenant` sees it. The administrator is told where it is, whoever brought it there."""
        digest, leases = adapter.adapter.digest, self.store.leases(tenant, adapter.tenant, adapter.name)
        tier = self.residency.told(digest, tenant, adapter.tenant, adapter.name, in_use=leases > 0)
        if caller.admin:
            tier = self.residency.of(digest)
        return Shown(adapter, tier, leases, is_own=adapter.tenant == tenant)

    async def _before(self, caller: Caller, new: NewAdapter) -> NamedAdapter | None:
        """What the name of a new adapter means now, if it is to be replaced. Raises Forbidden."""
        if not new.replace:
            return None
        try:
            adapter = await self.store.names.get(new.tenant, new.name)
        except NotFound:
            return None
        if adapter.tenant != new.tenant:
            return None  # a public one, which the new one will hide
        check_change(caller, adapter)
        return adapter

    async def _own(self, caller: Caller, tenant: str, name: str, *, for_change: bool = True) -> NamedAdapter:
        """A tenant's own adapter. Raises NotFound, Forbidden for what the caller sees but may not change."""
        adapter = await self.store.names.get(tenant, name)
        if adapter.tenant != tenant:
            if caller.admin:
                raise NotFound("adapter", name)
            raise Forbidden("the adapter is public and belongs to others: only the admin key may change it")
        if for_change:
            check_change(caller, adapter)
        return adapter

    async def _added(
        self, caller: Caller, new: NewAdapter, before: NamedAdapter | None, done: Registration, folder: Path
    ) -> Added:
        """Let the pin follow the name. A tenant's new adapter is not pinned in place of the one that was."""
        adapter, warnings, about = done.adapter, done.adapter.adapter.warnings, await self._touched(folder)
        was_pinned, info = before is not None and before.pinned, self._engine.info
        warnings += about.warnings(info.num_pages if info is not None else {})
        try:
            if new.pinned or adapter.pinned:
                adapter = await self._set_pinned(adapter, await self.pins.keep(resolved(adapter)))
        except NotFound:  # it was registered all the same
            adapter, warnings = replace(adapter, pinned=False), (*warnings, DELETED)
        if not adapter.pinned:
            await self.pins.unpin(adapter.tenant, adapter.name)
            if (was_pinned and new.pinned is None) or new.pinned:
                warnings = (*warnings, UNPINNED)
        await self.on_change(adapter.tenant, adapter.name)
        return Added(self.show(caller, new.tenant, adapter), about.modules, warnings)

    async def _touched(self, folder: Path) -> Touched:
        return await self.in_thread(touched, folder, self.store.shape)

    @contextmanager
    def _counting_rejections(self, tenant: str) -> Iterator[None]:
        try:
            yield
        except QuotaExceeded as error:
            if self.on_rejection is not None:
                self.on_rejection(tenant, error.code.removeprefix("quota_"))
            raise

    async def _set_pinned(self, adapter: NamedAdapter, is_pinned: bool) -> NamedAdapter:
        """Tell the registry, also of what it knows: a name that is gone meanwhile does not stay pinned."""
        try:
            return await self.store.names.update(adapter.tenant, adapter.name, pinned=is_pinned)
        except BaseException:
            await self.pins.unpin(adapter.tenant, adapter.name)
            raise

    async def _pin(self, tenant: str, name: str, digest: str) -> None:
        """Pin a revision of an own name. Raises Conflict without room."""
        wanted = f"{name}@{digest}"
        found = (await self.store.resolve(tenant, [wanted])).get(wanted)
        if found is None:
            raise NotFound("adapter", name)
        with engine_errors():
            if not await self.pins.pin(found):
                raise _no_room(name)

    async def _restore_pin(self, adapter: NamedAdapter) -> None:
        """The pin as the registry has it."""
        if adapter.pinned:
            await self.pins.keep(resolved(adapter))
        else:
            await self.pins.unpin(adapter.tenant, adapter.name)


async def _nobody(_tenant: str, _name: str) -> None:
    """Nobody listens."""


def _no_room(name: str) -> Conflict:
    return Conflict(
        f"adapter {name!r} cannot be pinned: pins take at most half of the page pool",
        param="pinned",
        code="pins_exhausted",
    )
