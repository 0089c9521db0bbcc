"""Pinned adapters where engines are far away: every engine follows the registry, a front end knows what has room."""

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path

from adapters_store.blobs import BlobError
from adapters_store.fetched import FetchedAdapters, UnknownDigest
from adapters_store.registry import RegistryError
from adapters_store.types import LinearShape
from server.catalog.touched import touched
from server.engine.adapter_calls import EngineUnavailable
from server.engine.client import EngineClient
from server.engine.config import EngineInfo, RequestError

logger = logging.getLogger(__name__)


class PinBudget:
    """Whether a pin has room, by the engines' own rule (`PagePool.pin`): half of each group's pages.

    It counts the pins that this front end knows of, and hears of others' a moment late; what an engine cannot pin after
    all, its log says.
    """

    def __init__(self, shape: LinearShape) -> None:
        self._shape = shape
        self._pages: dict[str, Mapping[str, int]] = {}

    async def pin(self, digest: str, path: str, info: EngineInfo) -> bool:
        """Count the adapter in this folder, if it has room."""
        if digest not in self._pages:
            pages = (await asyncio.to_thread(touched, Path(path), self._shape)).pages
            used: Counter[str] = Counter()
            for each in (pages, *self._pages.values()):
                used.update(each)
            if any(used[group] > count // 2 for group, count in info.num_pages.items()):
                return False
            self._pages[digest] = pages
        return True

    def unpin(self, digest: str) -> None:
        self._pages.pop(digest, None)


class PinFollower:
    """Pins in one engine what the registry says, with the adapters' folders kept in place."""

    def __init__(self, adapters: FetchedAdapters, engine: EngineClient) -> None:
        self._adapters = adapters
        self._engine = engine
        self._pins: dict[str, AsyncExitStack] = {}
        self._problems: dict[str, str] = {}  # as they were told

    async def follow(self) -> None:
        """Look once. What fails is tried again at the next look."""
        try:
            wanted = {each.digest for each in await asyncio.to_thread(self._adapters.registry.pinned)}
        except RegistryError as error:
            logger.warning("pins stay as they are: %s", error)
            return
        for digest in self._pins.keys() - wanted:
            self._engine.unpin(digest)
            await self._pins.pop(digest).aclose()
        problems = {digest: await self._pin(digest) for digest in sorted(wanted - self._pins.keys())}
        for digest, problem in problems.items():
            if problem is not None and self._problems.get(digest) != problem:
                logger.warning("adapter %s is not pinned: %s", digest[:12], problem)
        self._problems = {digest: problem for digest, problem in problems.items() if problem is not None}

    async def close(self) -> None:
        """Let go of the folders."""
        for kept in self._pins.values():
            await kept.aclose()
        self._pins.clear()

    async def _pin(self, digest: str) -> str | None:
        """Why it is not pinned now, None if it is."""
        try:
            async with AsyncExitStack() as stack:
                paths = await stack.enter_async_context(self._adapters.leased((digest,)))
                if not await self._engine.pin(digest, paths[digest]):
                    return "there is no room"
                self._pins[digest] = stack.pop_all()
        except (BlobError, EngineUnavailable, RegistryError, RequestError, UnknownDigest) as error:
            return str(error)
        return None
