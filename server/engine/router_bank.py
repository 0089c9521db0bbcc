"""The routers of one engine: each is read once, and stays while requests use it and for a while after."""

import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Generic, Protocol, TypeVar

from adapters_store.loader import Loader
from server.engine.config import RequestError

KEPT = 4
"""Routers that stay though no request uses them."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class InFolder(Protocol):
    """What a request wants of a router: the folder that it is in, and the digest of what is in there."""

    @property
    def digest(self) -> str: ...

    @property
    def path(self) -> str: ...


class RouterBank(Generic[T]):
    """Routers of one kind in memory, by digest. Not thread-safe; `loader` runs `read`, and reports where the engine
    polls it.
    """

    def __init__(self, loader: Loader, read: Callable[[str], T], kept: int = KEPT) -> None:
        self._loader = loader
        self._read = read
        self._kept = kept
        self._routers: dict[str, T | RequestError] = {}  # the least recently used first
        self._users: Counter[str] = Counter()
        self._reading: set[str] = set()

    def enter(self, use: InFolder) -> None:
        """A request comes; `leave` must be called once when it ends."""
        self._users[use.digest] += 1
        if isinstance(self._routers.get(use.digest), RequestError):
            del self._routers[use.digest]  # it may be there by now
        if use.digest in self._routers:
            self._routers[use.digest] = self._routers.pop(use.digest)
        elif use.digest not in self._reading:
            self._reading.add(use.digest)
            self._loader.submit(partial(self._read, use.path), partial(self._take, use.digest))

    def leave(self, use: InFolder) -> bool:
        """A request has ended. Whether it was the last one of its router."""
        self._users[use.digest] -= 1
        is_last = not self._users[use.digest]
        if is_last:
            del self._users[use.digest]
        self._forget()
        return is_last

    def get(self, digest: str) -> T | None:
        """The router, or None while it is being read. Raises RequestError if it could not be."""
        found = self._routers.get(digest)
        if isinstance(found, RequestError):
            raise found
        return found

    def __len__(self) -> int:
        return len(self._routers)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless all that is used is there or under way, and no more is kept than should be."""
        if lost := self._users.keys() - self._routers.keys() - self._reading:
            raise RuntimeError(f"requests use the routers {sorted(lost)}, which nobody reads")
        if len(self._reading) > self._loader.pending:
            raise RuntimeError(f"{len(self._reading)} routers are awaited, {self._loader.pending} tasks are pending")
        if len(self._routers.keys() - self._users.keys()) > self._kept:
            raise RuntimeError(f"{len(self._routers)} routers are kept, {len(self._users)} used")

    def _take(self, digest: str, found: T | Exception) -> None:
        self._reading.remove(digest)
        if isinstance(found, Exception):
            if not isinstance(found, ValueError | OSError):
                logger.error("router %s could not be read", digest, exc_info=found)
            self._routers[digest] = RequestError(
                f"the router cannot be read: {found}", param="lora.router", code="router_unavailable"
            )
        else:
            self._routers[digest] = found
        self._forget()

    def _forget(self) -> None:
        idle = [digest for digest in self._routers if digest not in self._users]
        for digest in idle[: max(0, len(idle) - self._kept)]:
            del self._routers[digest]
