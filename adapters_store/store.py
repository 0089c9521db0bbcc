"""The registered adapters of one base model: names and revisions, their files, and leases on them.

Registry (SQL) and blobs are durable; beside them a store keeps folders with the adapters in use. Nothing here blocks
the event loop: SQL and disk are left to threads.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from adapters_store.blobs import BlobMissing, BlobStore, Fault, no_fault
from adapters_store.deletion import AdapterInUse, Deletions
from adapters_store.folders import Folders
from adapters_store.intake import Intake, NewAdapter, find_adapters
from adapters_store.leases import NOBODY, Leases, StoreLease
from adapters_store.merge_size import unite
from adapters_store.merging import MergeRecipe
from adapters_store.names import Names
from adapters_store.neighbours import Neighbours
from adapters_store.opening import StoreOpenError, open_parts
from adapters_store.registry import (
    DEFAULT_TENANT,
    NamedAdapter,
    NotFound,
    Registration,
    Registry,
    RegistryError,
    Resolved,
)
from adapters_store.store_config import StoreConfig
from adapters_store.types import AdapterLimits, LinearShape
from adapters_store.work_folder import Staging, WorkFolder
from adapters_store.workers import Workers

__all__ = [
    "DEFAULT_TENANT",
    "AdapterInUse",
    "AdapterStore",
    "NewAdapter",
    "StoreConfig",
    "StoreLease",
    "StoreOpenError",
    "UnknownAdapter",
]


class UnknownAdapter(LookupError):
    """No adapter of this name that the tenant may see; one it may not see is reported in the same words."""

    def __init__(self, name: str) -> None:
        super().__init__(f"adapter {name!r} does not exist")
        self.name = name


class AdapterStore:
    """The adapters for a model of one shape. For one event loop, but `open` and `staging`, which belong to threads too.

    What is known of names, and how they change, is `names`' part. `on_gone` are called, on the event loop, with every
    digest that nobody has any more.
    """

    def __init__(
        self,
        registry: Registry,
        blobs: BlobStore,
        folder: WorkFolder,
        shape: LinearShape,
        base_name: str,
        reserved: Iterable[str],
        clock: Callable[[], float],
        timer: Callable[[], float],
        folder_bytes: int | None,
        fault: Fault,
        limits: AdapterLimits,
    ) -> None:
        self.registry = registry
        self.blobs = blobs
        self.shape = shape
        self.on_gone: list[Callable[[str], None]] = []
        self._clock = clock
        self._folder = folder
        self._intake = Intake(registry, blobs, folder, shape, base_name, reserved, fault, limits)
        self._workers = Workers()
        self.names = Names(registry, self._workers, timer)
        self._leases = Leases()
        self._folders = Folders(folder.adapters, blobs, self._workers.leases, self._is_leased, folder_bytes)
        self._deletions = Deletions(self.names.mark, self.names.remove, self._leases, self._gone)

    @classmethod
    def open(
        cls,
        shape: LinearShape,
        base_name: str,
        config: StoreConfig,
        clock: Callable[[], float],
        reserved: Iterable[str] = (),
        fault: Fault = no_fault,
        *,
        timer: Callable[[], float] = time.monotonic,
        is_first: bool = True,
    ) -> "AdapterStore":
        """Open registry and blobs, finish deletions that a killed process left. Blocks.

        `clock` gives seconds since the epoch, `timer` counts them; `reserved` names are refused; `fault` is for tests
        of crashes. One that is not the first of its server leaves deletions alone: somebody else may be at them. Raises
        StoreOpenError.
        """
        registry, blobs, folder = open_parts(shape, config, clock, fault)
        try:
            for tenant, name in registry.removals.marked() if is_first else ():
                with contextlib.suppress(NotFound):  # another process was faster
                    registry.removals.remove(tenant, name, only_marked=True)
        except RegistryError as error:
            registry.close()
            raise StoreOpenError(str(error)) from error
        folder_bytes = config.cache_bytes if config.blob_url.startswith("s3://") else None
        what = registry, blobs, folder, shape, base_name, reserved, clock, timer
        return cls(*what, folder_bytes, fault, config.limits)

    async def close(self) -> None:
        """Let writes under way end, stop everything else. Leases must be given back before."""
        await self._deletions.close()
        await self._workers.close()
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self.registry.close()
        self._folder.close()

    def staging(self) -> Staging:
        """A fresh temporary folder on the blobs' side: `with` or `async with store.staging() as folder`."""
        return self._folder.staging()

    async def register(self, folder: Path, new: NewAdapter, recipe: Mapping[str, object] | None = None) -> Registration:
        """Check, store and name the adapter in `folder`, which nobody else changes meanwhile.

        Raises AdapterError, BlobError, RegistryError. Once begun, it is finished even if the caller stops waiting.
        """
        self._intake.check_name(new.name)
        registration = await self.names.write(
            self._workers.writes, new.name, self._intake.register, folder, new, recipe
        )
        self._warm(registration.adapter)
        return registration

    async def register_folder(self, folder: Path) -> tuple[NamedAdapter, ...]:
        """Register every sub-folder that holds an adapter, under its own name, for everyone.

        A name whose current revision is the same adapter stays as it is, another gets a new revision. Raises
        AdapterError, naming the sub-folder, for the first one that cannot be served; BlobError, RegistryUnavailable.
        """
        found = await self._workers.run(self._workers.writes, find_adapters, folder)
        register = self._intake.register_named
        return tuple([await self.names.write(self._workers.writes, path.name, register, path) for path in found])

    async def resolve(self, tenant: str, names: Sequence[str]) -> Mapping[str, Resolved]:
        """What names mean for a tenant, as `Names.resolve` says. Raises RegistryUnavailable."""
        return await self.names.resolve(tenant, names)

    async def lease(self, tenant: str, adapters: Sequence[Resolved], *, fetch: bool = True) -> StoreLease:
        """Keep the folders of these adapters in place, made of their blobs if need be.

        Without `fetch` only their names are kept, and with them their blobs: for whoever makes the folders elsewhere.
        Raises UnknownAdapter for a name that is being deleted or whose blobs are gone, BlobError.
        """
        for adapter in adapters:
            if self._deletions.is_closed(adapter.tenant, adapter.name):
                raise UnknownAdapter(adapter.name)
        lease = self._leases.take(tenant, adapters)
        if not fetch:
            lease.paths = dict.fromkeys(lease.digests, "")
            return lease
        try:
            absent = [adapter for adapter in adapters if self._folders.find(adapter.digest) is None]
            if len(absent) > 1:  # they are fetched at the same time
                await asyncio.gather(*map(self._path, absent))
            lease.paths = {adapter.digest: await self._path(adapter) for adapter in adapters}
        except BaseException:
            self._leases.give_back(lease)
            raise
        return lease

    def release(self, lease: StoreLease) -> None:
        """Give a lease back. Raises RuntimeError the second time."""
        self._leases.give_back(lease)

    async def take_up_deletions(self) -> None:
        """Go on with those that somebody has begun, as soon as nobody uses the names. Raises RegistryUnavailable."""
        for owner, name in await self._workers.query(self.registry.removals.marked):
            self._deletions.finish(owner, name)

    def share_with(self, neighbours: Neighbours) -> None:
        """Deletions wait for the leases of these, too."""
        self._deletions.neighbours = neighbours

    def uses(self, owner: str, name: str) -> int:
        """How many requests of this process use a name. A pin's lease, which goes with the name, is no use of it."""
        return self._leases.of_name(owner, name) - self._leases.of_use(NOBODY, owner, name)

    async def idle(self, owner: str, name: str) -> None:
        """Another process deletes a name: return when nobody uses it here. It is looked up anew by who comes now."""
        self.names.forget(name)
        await self._leases.idle(owner, name)

    def is_deleting(self, tenant: str, name: str) -> bool:
        """Whether this process is deleting a tenant's own name."""
        return self._deletions.is_closed(tenant, name)

    def leases(self, tenant: str, owner: str, name: str) -> int:
        """How many leases of a tenant use a name."""
        return self._leases.of_use(tenant, owner, name)

    def digest_leases(self, digest: str) -> int:
        """How many leases use an adapter, under whichever name."""
        return self._leases.of_digest(digest)

    async def count(self) -> int:
        """How many adapters are stored, whatever their names."""
        return await self._workers.query(self.registry.count)

    async def delete(self, tenant: str, name: str, wait: bool | None = None, timeout: float = 60.0) -> bool:
        """Hide a tenant's own name from everybody at once, and forget it when no request uses it.

        True: it is gone. False: it goes when those requests have ended. `wait` True waits for that, at most `timeout`
        seconds; with False a name in use is refused by AdapterInUse. The deletion of a name that is hidden already goes
        on from there. Raises NotFound, RegistryUnavailable.
        """
        removal = await self._workers.finish(self._deletions.begin(tenant, name, wait is not False))
        if wait is not True and await self._deletions.uses(tenant, name):
            return False
        done, _ = await asyncio.wait({removal}, timeout=timeout)
        if not done or removal.cancelled():
            return False
        removal.result()  # else it has failed, and the name is still there
        return True

    async def merge(
        self,
        new: NewAdapter,
        entries: Sequence[tuple[str, float]],
        method: str,
        rank: int | None = None,
        density: float | None = None,
        seed: int = 0,
    ) -> Registration:
        """Merge adapters that the new one's tenant may use, given by name and weight, as `merging.merge` does.

        Names that mean the same adapter count as one, with the sum of their weights. What can be refused is refused
        before any adapter is read. Raises UnknownAdapter, AdapterError, BlobError, RegistryError.
        """
        MergeRecipe.of(entries, method, rank, density, seed)
        await self._workers.query(self._intake.check_new, new)
        found = await self.resolve(new.tenant, [name for name, _ in entries])
        for name, _ in entries:
            if name not in found:
                raise UnknownAdapter(name)
        adapters = unite([(found[name], weight) for name, weight in entries])
        recipe = MergeRecipe.of([(adapter.digest, weight) for adapter, weight in adapters], method, rank, density, seed)
        return await self._workers.finish(self._merge(new, adapters, recipe))

    async def sweep(self, grace: float) -> tuple[str, ...]:
        """Remove blobs that nothing references and nobody put for `grace` seconds, and folders of forgotten adapters.

        Returns the blobs' digests. Raises BlobError, RegistryUnavailable.
        """
        unused = [digest for digest in self._folders.digests if not self._is_leased(digest)]
        known = await self._workers.query(self.registry.known, unused)
        for digest in unused:
            if digest not in known:
                await self._gone(digest)
        return await self._workers.run(self._workers.writes, self._sweep_blobs, grace)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless leases, cache and folders are what they count."""
        self._leases.check_integrity()
        self.names.check_integrity()
        self._folders.check_integrity()

    async def _path(self, adapter: Resolved) -> str:
        path = self._folders.find(adapter.digest)
        if path is not None:
            return path
        try:
            return await self._folders.make(adapter)
        except BlobMissing as error:
            raise UnknownAdapter(adapter.name) from error

    def _warm(self, named: NamedAdapter) -> None:
        """Make the folder of a new adapter before it is leased; if that fails, the first lease says so."""
        row = named.adapter
        adapter = Resolved(named.tenant, named.name, row.digest, named.public, row.config_blob, row.weights_blob)
        self._workers.start(self._folders.make(adapter))

    async def _merge(
        self, new: NewAdapter, adapters: Sequence[tuple[Resolved, float]], recipe: MergeRecipe
    ) -> Registration:
        lease = await self.lease(new.tenant, [adapter for adapter, _ in adapters])
        try:
            terms = [(adapter, lease.paths[adapter.digest], weight) for adapter, weight in adapters]
            registration = await self.names.write(
                self._workers.merges, new.name, self._intake.merge, new, terms, recipe
            )
        finally:
            self.release(lease)
        self._warm(registration.adapter)
        return registration

    def _sweep_blobs(self, grace: float) -> tuple[str, ...]:
        return self.blobs.sweep(self.registry.referenced_blobs(), grace, self._clock())

    def _is_leased(self, digest: str) -> bool:
        return self._leases.of_digest(digest) > 0

    async def _gone(self, digest: str) -> None:
        await self._folders.remove(digest)
        for callback in self.on_gone:
            callback(digest)
