"""The adapters of one engine: packed in host memory, pages on the device, and the way from disk to both.

No call here waits for a disk or a device, but for `read_now` and `wait`. A request *arrives* once all its adapters have
been in host memory, so that their size is known; then the scheduler may `acquire` its pages, which are loaded as soon
as they can be had.
"""

import time
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from adapters_store.loader import Loader
from adapters_store.page_lease import PageLease
from adapters_store.pages import PackedAdapter
from adapters_store.pool import PagePool
from adapters_store.residents import resident_keys
from adapters_store.tiers import HostTier, Read
from adapters_store.types import Mix
from server.engine.config import RequestError
from server.engine.loads import Load, Loads
from server.engine.reads import Done, Reads
from server.engine.sequence import Request
from server.engine.wishes import Pinned, Prefetched, Wishes

UPLOAD_SECONDS = 2e-4
"""How often copies to the device are asked whether they are done while nothing else can run."""

Arrived = tuple[Request, RequestError | None]
"""A request that may be queued, or why it cannot be."""


@dataclass(eq=False)
class _Waiting:
    """A request from its coming to its end. `missing`: adapters that are to be read before it arrives."""

    request: Request
    missing: dict[str, Done] = field(default_factory=dict)
    wanted: bool = True
    load: Load | None = None


class EngineAdapters:
    """Host tier, pool and loader of one engine, for its requests and for pins and prefetches. Not thread-safe."""

    def __init__(self, host: HostTier, pool: PagePool, loader: Loader, read: Read, clock: Callable[[], float]) -> None:
        self.host = host
        self.pool = pool
        self._loader = loader
        self._wanted: Counter[str] = Counter()
        self._reads = Reads(host, loader, read, clock, self._wanted)
        self._loads = Loads(pool, host, self._reads, loader)
        self._wishes = Wishes(pool, host, self._reads, self._loads, loader)
        self._requests: dict[str, _Waiting] = {}
        self._arrived: list[Arrived] = []
        self._told: dict[str, str] = {}

    @property
    def wanted(self) -> Container[str]:
        """Adapters that requests wait for, as they are at any time."""
        return self._wanted

    @property
    def busy(self) -> bool:
        """Whether something is under way, so that `poll` should be called soon, requests or not."""
        return bool(self._loader.pending or self._loads or self._wishes.pending)

    @property
    def num_arriving(self) -> int:
        return sum(bool(waiting.missing) for waiting in self._requests.values())

    def arrive(self, request: Request) -> bool:
        """A request comes. True: it may be queued; else it is given by `poll` once its adapters have been read.

        Raises RequestError if it can never be served. After anything else `leave` must be called when it ends.
        """
        for digest in request.mix.digests:
            if digest not in request.paths:
                raise RequestError(f"the request names no folder for adapter {digest[:12]}", param="lora.adapters")
        self._check_size(request.mix)
        missing = sorted(digest for digest in request.mix.digests if not self._is_at_hand(request.mix, digest))
        waiting = self._requests[request.id] = _Waiting(request)
        self._wanted.update(request.mix.digests)
        if not missing:
            self._load_early(request)
        waiting.missing = {digest: partial(self._read, waiting, digest) for digest in missing}
        for digest, done in waiting.missing.items():
            self._reads.start(digest, request.paths[digest], done, tenant=request.tenant)
        return not missing

    def leave(self, request: Request) -> None:
        """A request has ended. What is being read or copied for it goes on, for others; what is not begun does not."""
        waiting = self._requests.pop(request.id, None)
        if waiting is not None:
            self._unwant(waiting)
            self._cancel(waiting)

    def poll(self, *, idle: bool) -> list[Arrived]:
        """Take note of what was read and copied, and start what can go on. `idle`: no request is there."""
        self._loader.poll()
        self._reads.forget_ranks(self._in_use)
        self._loads.poll()
        self._wishes.poll(idle=idle)
        arrived, self._arrived = self._arrived, []
        for request, error in arrived:
            if error is None:
                self._load_early(request)
        return arrived

    def acquire(self, request: Request) -> PageLease | None:
        """All pages of the request's mix, or None while they are being loaded or cannot be had.

        Raises RequestError when they never can, or if an adapter that was on its way for this request failed.
        """
        waiting = self._requests[request.id]
        load, waiting.load = waiting.load, None
        if load is not None and load.error is not None:
            raise load.error
        lease = self.pool.acquire(request.mix)
        if lease is not None:
            self._unwant(waiting)
            return lease
        waiting.load = self._loads.get(request.mix) or self._load(request)
        if waiting.load is None:
            self._check_size(request.mix)  # pins may have taken what it needs
        return None

    def is_loading(self, mix: Mix) -> bool:
        """Whether the pages of `mix` are reserved and its adapters on their way."""
        return self._loads.get(mix) is not None

    def can_load(self, mix: Mix) -> bool:
        """Whether `acquire` would begin now, or has begun, to load the pages of `mix` if it does not have them."""
        return self.pool.can_reserve(mix, self._reads.ranks)

    def fit_together(self, mixes: Iterable[Mix]) -> bool:
        """Whether the pages of all these mixes could be had at once."""
        return self.pool.shortage(mixes, self._reads.ranks) is None

    def release(self, lease: PageLease) -> None:
        self.pool.release(lease)

    def pin(self, digest: str, path: str, done: Pinned) -> None:
        """See `Wishes.pin`."""
        self._wishes.pin(digest, path, done)

    def unpin(self, digest: str) -> None:
        """Let a pinned adapter be evicted like others. Nothing happens if it is not pinned."""
        self._wishes.unpin(digest)

    def evict(self, digest: str) -> None:
        """Free an adapter's host memory now, and its pages as soon as nothing uses them, unless it is pinned.

        Whoever takes an adapter away unpins it before; a pin that is there has come since, for the same weights.
        """
        if self._wishes.has_pin(digest):
            return
        self._wishes.forget(digest)
        self._reads.forget(digest)
        self.host.drop(digest)
        self.pool.evict(digest)

    def prefetch(self, digest: str, path: str, done: Prefetched) -> None:
        """See `Wishes.prefetch`."""
        self._wishes.prefetch(digest, path, done)

    def read_ahead(self, paths: dict[str, str]) -> None:
        """See `Wishes.read_ahead`."""
        self._wishes.read_ahead(paths)

    def read_now(self, digest: str, path: str) -> None:
        """Read an adapter into host memory, waiting for it, unless it is there. Raises AdapterError."""
        if digest not in self.host:
            self._reads.read_now(digest, path)

    def wait(self, seconds: float) -> None:
        """Return when `poll` may have news, at once if nothing is under way, at the latest after this time."""
        if self._loads.uploading:
            time.sleep(min(seconds, UPLOAD_SECONDS))  # an event can be asked or waited for, but not until a time
        elif self._loader.pending:
            self._loader.wait(seconds)

    def residency(self, digest: str) -> str:
        """The fastest tier that holds an adapter: "device", "host", or "disk"."""
        if self.pool.is_loaded(digest):
            return "device"
        return "host" if digest in self.host else "disk"

    def take_residency(self) -> dict[str, str]:
        """The residency of adapters whose own has changed since this was last asked."""
        changes: dict[str, str] = {}
        for digest in (self.host.moved | self.pool.moved) & self._reads.ranks.keys():  # not materialised fusions
            found = self.residency(digest)
            if found != self._told.pop(digest, "disk"):
                changes[digest] = found
            if found != "disk":
                self._told[digest] = found
        self.host.moved.clear()
        self.pool.moved.clear()
        return changes

    @property
    def told(self) -> dict[str, str]:
        """The residency of all adapters that are not on disk alone, as of the last `take_residency`."""
        return dict(self._told)

    def take_read_seconds(self) -> tuple[float, ...]:
        """How long each read from disk took since this was last asked."""
        seconds = tuple(self._reads.seconds)
        self._reads.seconds.clear()
        return seconds

    def close(self, seconds: float = 1.0) -> None:
        """Start no more reads, and give those under way this long."""
        self._loader.close(seconds)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every tier accounts for all it owns, and nobody waits for nothing."""
        self.host.check_integrity()
        self.pool.check_integrity()
        self._reads.check_integrity()
        self._loads.check_integrity()
        wanted = Counter(d for own in self._requests.values() if own.wanted for d in own.request.mix.digests)
        if wanted != self._wanted:
            raise RuntimeError(f"requests want {dict(wanted)}, kept are {dict(self._wanted)}")

    def _is_at_hand(self, mix: Mix, digest: str) -> bool:
        """Whether an adapter's size is known, and its weights where a load would take them from."""
        if digest not in self._reads.ranks:
            return False
        return self.host.get(digest) is not None or all(map(self.pool.is_loaded, resident_keys(mix)))

    def _read(self, waiting: _Waiting, digest: str, packed: PackedAdapter | RequestError) -> None:
        """An adapter that a request waits for came, or did not."""
        if self._requests.get(waiting.request.id) is not waiting or not waiting.missing:
            return  # it has left, or another of its adapters could not be read
        try:
            if isinstance(packed, RequestError):
                raise packed
            del waiting.missing[digest]
            self._check_size(waiting.request.mix)
            if not waiting.missing:
                self._arrived.append((waiting.request, None))
        except RequestError as error:
            self._cancel(waiting)
            self._arrived.append((waiting.request, error))

    def _cancel(self, waiting: _Waiting) -> None:
        for digest, done in waiting.missing.items():
            self._reads.cancel(digest, done)
        waiting.missing.clear()

    def _load_early(self, request: Request) -> None:
        """Use free pages before it is the request's turn."""
        if not self.pool.holds(request.mix) and self._loads.get(request.mix) is None:
            self._load(request, evict=False)

    def _load(self, request: Request, *, evict: bool = True) -> Load | None:
        return self._loads.start(request.mix, request.paths, evict=evict, tenant=request.tenant)

    def _in_use(self) -> set[str]:
        """Adapters whose ranks somebody may need, or whose tier is to be told."""
        named = {digest for own in self._requests.values() for digest in own.request.mix.digests}
        return named | self._wishes.digests | self._told.keys() | self.host.moved | self.pool.moved

    def _check_size(self, mix: Mix) -> None:
        """Raises RequestError if the adapters of `mix` whose ranks are known are too large already."""
        known = tuple((digest, weight) for digest, weight in mix.entries if digest in self._reads.ranks)
        number = len(mix.entries)
        part = mix if len(known) == number else replace(mix, entries=known)
        short = self.pool.shortage((part,), self._reads.ranks)
        if short is None:
            return
        raise RequestError(
            f"the {number} adapter{'s' * (number > 1)} of this request need{'s' * (number == 1)} more rank pages than"
            f" the server has: {'at least ' * (len(known) < number)}{short.needed} for {short.group}, of"
            f" {short.pages} that there are and {short.pinned} that pinned adapters take",
            param="lora.adapters",
            code="mix_too_large",
        )

    def _unwant(self, waiting: _Waiting) -> None:
        if waiting.wanted:
            waiting.wanted = False
            for digest in waiting.request.mix.digests:
                self._wanted[digest] -= 1
                if not self._wanted[digest]:
                    del self._wanted[digest]
