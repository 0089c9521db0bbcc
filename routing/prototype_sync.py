"""The registry's prototypes and an index in memory, kept equal; prototypes made where they are missing."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from adapters_store.registry import NewPrototype, PrototypeRow, RegistryError, TextsRow
from adapters_store.store import AdapterStore
from routing.encoder import Encoder, EncoderUnavailable
from routing.prototype_index import PrototypeIndex
from routing.prototype_rows import Key
from routing.prototypes import prototypes

logger = logging.getLogger(__name__)

_PAGE = 500
"""Rows or names read at a time."""
_TEXTS = 256
"""Texts embedded at a time, whole names."""
_AT_ONCE = 4
"""Names of one tenant whose texts are with the encoder at a time."""
_LONGEST_WAIT = 64.0


class PrototypeSync:
    """One encoder's prototypes; the only one that writes to its index. For one event loop.

    What this process registers is in the index when `ensure` returns; what others do, at the next `refresh`. A failing
    encoder leaves names without prototypes, for `embed_missing` to try again.
    """

    def __init__(self, store: AdapterStore, encoder: Encoder, index: PrototypeIndex, most: int = 4) -> None:
        self._prototypes = store.registry.prototypes
        self._encoder = encoder
        self._index = index
        self._most = most
        self._versions: dict[Key, int] = {}  # of what was read or written, usable or not
        self._last = 0  # version up to which all changes have been read
        self._seen = -1  # version at which the removed ones were looked for
        self._complete = False  # nothing is known to be missing
        self._reading = asyncio.Lock()
        self._embedding = asyncio.Lock()
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # by tenant

    async def refresh(self) -> None:
        """Read what was changed or removed since the last time. Raises RegistryUnavailable."""
        async with self._reading:
            version = await asyncio.to_thread(self._prototypes.version)
            if version == self._seen:
                return
            while True:
                rows = await asyncio.to_thread(self._prototypes.changed, self._encoder.id, self._last, _PAGE)
                for row in rows:
                    self._apply(row)
                    self._last = row.version
                if len(rows) < _PAGE:
                    break
            if await asyncio.to_thread(self._prototypes.count, self._encoder.id) != len(self._versions):
                await self._drop_removed()
            self._seen = version

    async def embed_missing(self) -> bool:
        """Make the prototypes that are missing or of other texts; False if the encoder failed, then some still are.

        Raises RegistryUnavailable.
        """
        async with self._embedding:
            self._complete = True
            try:
                await self._embed_missing()
            except EncoderUnavailable as error:
                self._complete = False
                logger.warning("prototypes of adapters are not made, and tried again later: %s", error)
                return False
            except BaseException:  # whatever it is, also who gives up waiting for it
                self._complete = False
                raise
            return True

    async def ensure(self, tenant: str, name: str) -> bool:
        """Make one name's prototypes if need be; whether the router can find it from now on.

        For after a registration, or a change of samples, description or `public`: no failure is raised, but logged.
        A few of a tenant's names at a time: one who changes samples faster than they are read makes the others wait for
        no more than these, and what a name has when its turn comes is what is read.
        """
        async with self._turns.setdefault(tenant, asyncio.Semaphore(_AT_ONCE)):
            return await self._ensure(tenant, name)

    async def _ensure(self, tenant: str, name: str) -> bool:
        try:
            row = await asyncio.to_thread(self._prototypes.texts, tenant, name, self._encoder.id)
            if row is None or not row.texts:
                if row is not None and row.stored is not None:
                    await asyncio.to_thread(self._prototypes.remove, tenant, name, self._encoder.id)
                self.forget(tenant, name)
                return False
            if row.stored != row.source:
                await self._embed([row])
            else:
                stored = await asyncio.to_thread(self._prototypes.get, tenant, name, self._encoder.id)
                if stored is not None:
                    self._apply(stored)
        except Exception as error:
            self._complete = False
            trace = None if isinstance(error, EncoderUnavailable | RegistryError) else error
            logger.warning("adapter %r of tenant %r has no prototypes yet: %s", name, tenant, error, exc_info=trace)
        return (tenant, name) in self._index

    def forget(self, tenant: str, name: str) -> None:
        """Take a name out of the index at once, for after its deletion."""
        self._versions.pop((tenant, name), None)
        self._index.remove(tenant, name)

    async def run(self, every: float = 1.0, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Refresh every `every` seconds, and make what is missing, until cancelled.

        After a failure of the encoder that is tried again, at ever longer intervals up to about a minute.
        """
        due, wait = 0.0, every  # seconds until the next attempt, and from that one to the one after it
        while True:
            try:
                await self.refresh()
                if not self._complete and due <= 0:
                    due, wait = wait, min(2 * wait, _LONGEST_WAIT)
                    if await self.embed_missing():
                        due, wait = 0.0, every
            except RegistryError as error:
                logger.warning("prototypes cannot be read: %s", error)
            except Exception:  # as of a system that has no thread now: nobody would see that this has ended
                logger.exception("prototypes are read later")
            await sleep(every)
            due -= every

    async def _embed_missing(self) -> None:
        cursor: str | None = None
        while True:
            page = await asyncio.to_thread(self._prototypes.missing, self._encoder.id, _PAGE, cursor)
            for names in _in_chunks(page.items):
                await self._embed(names)
            if page.next is None:
                return
            cursor = page.next

    async def _embed(self, names: Sequence[TextsRow]) -> None:
        vectors = await self._encoder.embed([text for row in names for text in row.texts], bulk=True)
        new = await asyncio.to_thread(_condense, self._encoder.id, names, vectors, self._most)
        versions = await asyncio.to_thread(self._prototypes.put_many, new)
        public = {(row.tenant, row.name): row.public for row in names}
        for each in new:
            key = (each.tenant, each.name)
            if key in versions:
                self._apply(PrototypeRow(**vars(each), public=public[key], version=versions[key]))

    def _apply(self, row: PrototypeRow) -> None:
        key = (row.tenant, row.name)
        if row.version <= self._versions.get(key, 0):
            return
        self._versions[key] = row.version
        try:
            vectors = np.frombuffer(row.vectors, "<f4").reshape(row.count, row.width)
            self._index.put(row.tenant, row.name, row.public, vectors.astype(np.float32))
        except ValueError as error:
            self._index.remove(*key)
            logger.warning("adapter %r of tenant %r cannot be routed to: %s", row.name, row.tenant, error)

    async def _drop_removed(self) -> None:
        version, keys = await asyncio.to_thread(self._prototypes.keys, self._encoder.id)
        for key in [key for key, written in self._versions.items() if written <= version and key not in keys]:
            self.forget(*key)


def _condense(encoder: str, names: Sequence[TextsRow], vectors: NDArray[np.float32], most: int) -> list[NewPrototype]:
    """The prototypes of names whose texts' embeddings stand in `vectors` one after the other."""
    new: list[NewPrototype] = []
    start = 0
    for row in names:
        some = prototypes(vectors[start : start + len(row.texts)], most)
        start += len(row.texts)
        count, width = some.shape
        data = some.astype("<f4").tobytes()
        new.append(NewPrototype(row.tenant, row.name, encoder, row.source, data, count, width))
    return new


def _in_chunks(names: Sequence[TextsRow]) -> list[list[TextsRow]]:
    """Names in parts of about `_TEXTS` texts."""
    chunks: list[list[TextsRow]] = []
    texts = 0
    for row in names:
        if not chunks or texts + len(row.texts) > _TEXTS:
            chunks.append([])
            texts = 0
        chunks[-1].append(row)
        texts += len(row.texts)
    return chunks
