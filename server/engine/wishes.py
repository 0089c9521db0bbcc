"""Adapters that somebody wants in memory without a request: pinned, prefetched, or read ahead in idle time."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from adapters_store.loader import Loader
from adapters_store.pages import PackedAdapter
from adapters_store.pool import PagePool
from adapters_store.tiers import HostTier
from adapters_store.types import Mix
from server.engine.config import RequestError
from server.engine.loads import Load, Loads
from server.engine.reads import Reads

logger = logging.getLogger(__name__)

Pinned = Callable[[bool | RequestError], None]
"""Whether there was room for the pin, or why the adapter cannot be read."""

Prefetched = Callable[[str | RequestError], None]
"""Where the adapter is now ("disk" if it was evicted meanwhile), or why it cannot be loaded."""


@dataclass(eq=False)
class _Ask:
    """A pin or prefetch whose adapter is being read."""

    digest: str
    path: str
    is_pin: bool


@dataclass(eq=False)
class _Pin:
    """An accepted pin that is not on the device yet. Its pages may be in use: then it waits for them."""

    path: str
    load: Load | None = None


class Wishes:
    """What it starts goes on in `poll`. Requests come first for the disk; pins come first for pages."""

    def __init__(self, pool: PagePool, host: HostTier, reads: Reads, loads: Loads, loader: Loader) -> None:
        self._pool = pool
        self._host = host
        self._reads = reads
        self._loads = loads
        self._loader = loader
        self._asks: set[_Ask] = set()
        self._pins: dict[str, _Pin] = {}
        self._pinned: set[str] = set()  # all that were accepted, loaded or not
        self._prefetches: list[tuple[Load, Prefetched]] = []
        self._ahead: dict[str, str] = {}

    @property
    def pending(self) -> bool:
        """Whether `poll` may have something to do."""
        return bool(self._pins or self._prefetches or self._ahead)

    @property
    def digests(self) -> set[str]:
        """What is pinned or being loaded."""
        return self._pinned.union(*(load.reservation.mix.digests for load, _ in self._prefetches))

    def has_pin(self, digest: str) -> bool:
        """Whether an adapter is pinned, or will be if there is room once it has been read."""
        return digest in self._pinned or any(ask.is_pin and ask.digest == digest for ask in self._asks)

    def pin(self, digest: str, path: str, done: Pinned) -> None:
        """Keep an adapter on the device, from the moment at which its pages can be had. Pinning twice changes `path`.

        False if pins would then own more than half of the pages of some group.
        """
        if digest in self._reads.ranks:
            self._pin(digest, path, done)
        else:
            ask = self._ask(digest, path, is_pin=True)
            self._reads.start(digest, path, partial(self._pin_read, ask, done))

    def unpin(self, digest: str) -> None:
        """Undo `pin`, if there was one."""
        self._asks = {ask for ask in self._asks if ask.digest != digest or not ask.is_pin}
        self._pins.pop(digest, None)
        self._pinned.discard(digest)
        self._pool.unpin(digest)

    def forget(self, digest: str) -> None:
        """Undo all that was wished of an adapter that has no pin, as far as it has not come yet."""
        self._asks = {ask for ask in self._asks if ask.digest != digest}
        self._ahead.pop(digest, None)

    def prefetch(self, digest: str, path: str, done: Prefetched) -> None:
        """Bring an adapter into host memory, and onto the device if its pages can be had now."""
        if self._pool.is_loaded(digest):
            done("device")
        elif digest in self._host:
            self._prefetch_load(digest, path, done)
        else:
            ask = self._ask(digest, path, is_pin=False)
            self._reads.start(digest, path, partial(self._prefetch_read, ask, done))

    def read_ahead(self, paths: dict[str, str]) -> None:
        """Read these (digest to folder) into host memory while there is nothing else to do and room is left."""
        self._ahead |= paths

    def poll(self, *, idle: bool) -> None:
        """Go on. `idle`: no request is there."""
        self._poll_pins()
        waiting, self._prefetches = self._prefetches, []
        for load, done in waiting:
            if load.done:
                done("device" if load.error is None else load.error)
            else:
                self._prefetches.append((load, done))
        if self._ahead and idle and not self._loader.pending:  # one at a time: a request waits for one read at most
            self._read_one_ahead()

    def _poll_pins(self) -> None:
        for digest, pin in list(self._pins.items()):
            if pin.load is not None and pin.load.done and pin.load.error is not None:
                logger.warning("pinned adapter %s is not loaded: %s", digest, pin.load.error)
                del self._pins[digest]
            elif self._pool.is_loaded(digest):
                del self._pins[digest]
            elif pin.load is None or pin.load.done:
                pin.load = self._load(digest, pin.path)

    def _read_one_ahead(self) -> None:
        if not self._host.has_room:
            self._ahead.clear()
            return
        digest, path = self._ahead.popitem()
        if digest not in self._host:
            self._reads.start(digest, path, lambda _: None)  # whoever asks for one that cannot be read will be told

    def _pin(self, digest: str, path: str, done: Pinned) -> None:
        pinned = self._pool.pin(digest, self._reads.ranks[digest])
        if pinned:
            self._pins[digest] = _Pin(path)
            self._pinned.add(digest)
        done(pinned)

    def _ask(self, digest: str, path: str, *, is_pin: bool) -> _Ask:
        ask = _Ask(digest, path, is_pin)
        self._asks.add(ask)
        return ask

    def _pin_read(self, ask: _Ask, done: Pinned, packed: PackedAdapter | RequestError) -> None:
        if ask not in self._asks:  # unpinned meanwhile
            done(False)
            return
        self._asks.remove(ask)
        if isinstance(packed, RequestError):
            done(packed)
        else:
            self._pin(ask.digest, ask.path, done)

    def _prefetch_read(self, ask: _Ask, done: Prefetched, packed: PackedAdapter | RequestError) -> None:
        if ask not in self._asks:  # evicted meanwhile
            done("disk")
            return
        self._asks.remove(ask)
        if isinstance(packed, RequestError):
            done(packed)
        elif self._pool.is_loaded(ask.digest):
            done("device")
        else:
            self._prefetch_load(ask.digest, ask.path, done)

    def _prefetch_load(self, digest: str, path: str, done: Prefetched) -> None:
        load = self._load(digest, path)
        if load is None:
            done("host")
        else:
            self._prefetches.append((load, done))

    def _load(self, digest: str, path: str) -> Load | None:
        mix = Mix(((digest, 1.0),))
        return self._loads.get(mix) or self._loads.start(mix, {digest: path})
