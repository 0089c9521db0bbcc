"""Adapters on their way from disk to host memory."""

import logging
from collections.abc import Callable, Container, Mapping
from functools import partial

from adapters_store.loader import Loader
from adapters_store.pages import PackedAdapter
from adapters_store.tiers import HostTier, Read
from adapters_store.types import AdapterError
from server.engine.config import RequestError

Done = Callable[[PackedAdapter | RequestError], None]

logger = logging.getLogger(__name__)


class Reads:
    """Reads adapters by the loader, each once however many wait for it, and keeps them in the host tier.

    `ranks` has `AdapterWeights.group_ranks` of every digest that was ever read. `keep`: digests that the host tier
    must not drop for others, as somebody waits for them. `seconds`: how long each read took, for whoever clears it.
    """

    def __init__(
        self, host: HostTier, loader: Loader, read: Read, clock: Callable[[], float], keep: Container[str]
    ) -> None:
        self.ranks: dict[str, Mapping[str, int]] = {}
        self.seconds: list[float] = []
        self._host = host
        self._loader = loader
        self._read = read
        self._clock = clock
        self._keep = keep
        self._waiting: dict[str, list[Done]] = {}
        self._unwanted: set[str] = set()

    def start(self, digest: str, path: str, done: Done) -> None:
        """Read an adapter, or join whoever reads it already. `done` gets it, or a RequestError, in a later poll."""
        self._unwanted.discard(digest)
        waiting = self._waiting.setdefault(digest, [])
        waiting.append(done)
        if len(waiting) == 1:
            self._loader.submit(partial(self._timed, digest, path), partial(self._finish, digest))

    def read_now(self, digest: str, path: str) -> None:
        """Read an adapter into the host tier, waiting for the disk. Raises what reading raises."""
        self._keep_read(*self._timed(digest, path))

    def forget(self, digest: str) -> None:
        """What is being read does not stay in the host tier, unless it is asked for again before it comes."""
        if digest in self._waiting:
            self._unwanted.add(digest)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless everything that is awaited is under way."""
        if len(self._waiting) > self._loader.pending or not self._unwanted <= self._waiting.keys():
            raise RuntimeError(f"{len(self._waiting)} adapters are awaited, {self._loader.pending} tasks are under way")

    def _timed(self, digest: str, path: str) -> tuple[PackedAdapter, float]:
        started = self._clock()
        packed = self._read(digest, path)
        return packed, self._clock() - started

    def _finish(self, digest: str, result: tuple[PackedAdapter, float] | Exception) -> None:
        waiting = self._waiting.pop(digest)
        outcome = unavailable(digest, result) if isinstance(result, Exception) else self._keep_read(*result)
        self._unwanted.discard(digest)
        for done in waiting:
            done(outcome)

    def _keep_read(self, packed: PackedAdapter, seconds: float) -> PackedAdapter:
        self.ranks[packed.digest] = packed.group_ranks
        self.seconds.append(seconds)
        if packed.digest not in self._unwanted:
            self._host.insert(packed, self._keep)
        return packed


def unavailable(digest: str, error: Exception) -> RequestError:
    """What those are told who wait for an adapter that could not be loaded."""
    if isinstance(error, AdapterError | OSError):  # it was fine when it was registered
        message = str(error)
    else:
        logger.error("adapter %s could not be loaded", digest, exc_info=error)
        message = f"adapter {digest[:12]} could not be loaded"
    return RequestError(message, param="model", code="adapter_unavailable")
