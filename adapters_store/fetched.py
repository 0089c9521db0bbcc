"""The adapters of an engine that has no front end beside it: known by digest, fetched when a request needs them."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager

from adapters_store.blobs import BlobStore
from adapters_store.folders import Folders
from adapters_store.opening import open_parts
from adapters_store.registry import Registry, Resolved
from adapters_store.store_config import StoreConfig
from adapters_store.types import LinearShape
from adapters_store.work_folder import WorkFolder
from adapters_store.workers import Workers


class UnknownDigest(LookupError):
    """Nobody has an adapter of this digest any more."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"adapter {digest[:12]} does not exist")


class FetchedAdapters:
    """Folders of adapters, made of their blobs. For one event loop.

    Whoever sends digests keeps their names meanwhile, as a front end's lease does. `on_gone` are called, on the event
    loop, with every digest that nobody has any more.
    """

    def __init__(self, registry: Registry, blobs: BlobStore, folder: WorkFolder, folder_bytes: int | None) -> None:
        self.registry = registry
        self.blobs = blobs
        self.on_gone: list[Callable[[str], None]] = []
        self._folder = folder
        self._workers = Workers()
        self._uses: Counter[str] = Counter()
        self._folders = Folders(folder.adapters, blobs, self._workers.leases, self._is_used, folder_bytes)

    @classmethod
    def open(cls, shape: LinearShape, config: StoreConfig, clock: Callable[[], float]) -> "FetchedAdapters":
        """Those of a registry for models of this shape. Blocks. Raises StoreOpenError."""
        is_remote = config.blob_url.startswith("s3://")
        return cls(*open_parts(shape, config, clock), config.cache_bytes if is_remote else None)

    async def close(self) -> None:
        """Leases must have ended before."""
        await self._workers.close()
        await asyncio.to_thread(self._close)

    @asynccontextmanager
    async def leased(self, digests: Collection[str]) -> AsyncIterator[Mapping[str, str]]:
        """Their folders by digest, in place until the block ends.

        Raises UnknownDigest, BlobError, RegistryUnavailable.
        """
        self._uses.update(digests)
        try:
            absent = [digest for digest in digests if self._folders.find(digest) is None]
            found = await self._workers.run(self._workers.sql, self.registry.blobs_of, absent) if absent else {}
            for digest in absent:  # before any folder is begun, which would come after the lease has ended
                if digest not in found:
                    raise UnknownDigest(digest)
            await asyncio.gather(*(self._make(digest, *found[digest]) for digest in absent))
            paths = {digest: self._folders.find(digest) for digest in digests}
            yield {digest: path for digest, path in paths.items() if path is not None}
        finally:
            for digest in digests:
                self._uses[digest] -= 1
                if not self._uses[digest]:
                    del self._uses[digest]

    async def sweep(self) -> None:
        """Remove folders of adapters that nobody has any more. Raises RegistryUnavailable."""
        unused = [digest for digest in self._folders.digests if not self._is_used(digest)]
        known = await self._workers.run(self._workers.sql, self.registry.known, unused)
        for digest in unused:
            if digest not in known:
                await self._folders.remove(digest)
                for callback in self.on_gone:
                    callback(digest)

    def _is_used(self, digest: str) -> bool:
        return self._uses[digest] > 0

    async def _make(self, digest: str, config_blob: str, weights_blob: str) -> None:
        await self._folders.make(Resolved("", digest, digest, False, config_blob, weights_blob))

    def _close(self) -> None:
        self.registry.close()
        self._folder.close()
