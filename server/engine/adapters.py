"""The adapters of one engine: weights in host memory, pages on the device, and the way from disk to both."""

from collections.abc import Callable

from adapters_store.pool import PageLease, PagePool
from adapters_store.tiers import HostTier
from adapters_store.types import AdapterWeights
from server.engine.config import RequestError
from server.engine.sequence import Request


class EngineAdapters:
    """Acquires the device pages of a request's mix, reading adapters into the host tier on first use."""

    def __init__(self, host: HostTier, pool: PagePool, clock: Callable[[], float]) -> None:
        self.host = host
        self.pool = pool
        self.clock = clock
        self._read_seconds: list[float] = []

    def check(self, request: Request) -> None:
        """Raise RequestError if the request's mix cannot be read or could never be resident as a whole."""
        ranks = {digest: self._weights(request, digest).group_ranks for digest in request.mix.digests}
        if not self.pool.fits(request.mix, ranks):
            raise RequestError(
                f"the {len(request.mix.entries)} adapters of this request need more rank pages than the server has",
                param="lora.adapters",
                code="mix_too_large",
            )

    def prefetch(self, digest: str, path: str) -> None:
        """Read an adapter into the host tier, unless that would push out another. Raises AdapterError."""
        if digest not in self.host and self.host.has_room:
            self._read(digest, path)

    def acquire(self, request: Request) -> PageLease | None:
        """All pages of the request's mix, or None while they cannot be had."""
        return self.pool.acquire(request.mix, lambda digest: self._weights(request, digest))

    def take_read_seconds(self) -> tuple[float, ...]:
        """How long each read from disk took since this was last asked."""
        seconds, self._read_seconds = tuple(self._read_seconds), []
        return seconds

    def release(self, lease: PageLease) -> None:
        self.pool.release(lease)

    def _weights(self, request: Request, digest: str) -> AdapterWeights:
        path = request.paths.get(digest)
        if path is None:
            raise RequestError(f"the request names no folder for adapter {digest[:12]}", param="lora.adapters")
        return self._read(digest, path)

    def _read(self, digest: str, path: str) -> AdapterWeights:
        before, started = self.host.counters.loads, self.clock()
        weights = self.host.get(digest, path)
        if self.host.counters.loads > before:
            self._read_seconds.append(self.clock() - started)
        return weights
