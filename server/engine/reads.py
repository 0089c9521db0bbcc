"""Adapters on their way from disk to host memory."""

import logging
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

import torch

from adapters_store.loader import Loader, ThreadLoader, as_exception
from adapters_store.pages import PackedAdapter, rank_pages
from adapters_store.tiers import HostTier, Read
from adapters_store.types import AdapterError
from server.engine.config import RequestError
from server.engine.turns import Turns

Done = Callable[[PackedAdapter | RequestError], None]

REMEMBERED = 1 << 14
"""Adapters whose ranks are remembered though they are in no memory; about 8 MB."""

logger = logging.getLogger(__name__)


class TooManyPages(RequestError):
    """An adapter that needs more rank pages than the device has. `ranks` as `AdapterWeights.group_ranks`."""

    def __init__(self, ranks: Mapping[str, int], message: str) -> None:
        super().__init__(message, param="lora.adapters", code="mix_too_large")
        self.ranks = ranks


def page_check(num_pages: Mapping[str, int]) -> Callable[[Mapping[str, int]], None]:
    """Raises TooManyPages for ranks by group that could never be had of so many pages by group."""

    def check(ranks: Mapping[str, int]) -> None:
        for name, needed in rank_pages(ranks).items():
            if needed > num_pages[name]:
                raise TooManyPages(
                    ranks, f"the adapter needs {needed} rank pages for {name}, more than the server's {num_pages[name]}"
                )

    return check


@dataclass(eq=False)
class _Outcome:
    """Of one piece of work for the loader. `digest` None: there was nothing left to read."""

    digest: str | None
    packed: PackedAdapter | Exception | None = None
    seconds: float = 0.0


@dataclass(eq=False)
class _Reading:
    """An adapter from being asked for until it was read."""

    path: str
    waiting: list[Done] = field(default_factory=list)
    wanted: bool = True  # in host memory


class Reads:
    """Reads adapters by the loader, each once however many wait for it, and keeps them in the host tier.

    What is read next is decided when a thread of the loader is free: tenants take turns, and what nobody waits for any
    more is not begun.

    `ranks` has `AdapterWeights.group_ranks` of every digest that was read, until `forget_ranks`. `keep`: digests that
    the host tier must not drop for others, as somebody waits for them. `seconds`: how long each read took, for whoever
    clears it.
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
        self._readings: dict[str, _Reading] = {}
        self._turns = Turns()
        self._tasks = 0  # submitted to the loader and not reported
        self._most_ranks = REMEMBERED

    def start(self, digest: str, path: str, done: Done, *, tenant: str = "", first: bool = False) -> None:
        """Read an adapter, or join whoever reads it already. `done` gets it, or a RequestError, in a later poll.

        tenant: in whose turn. first: before all others in it, as for pages that are held for the adapter.
        """
        reading = self._readings.get(digest)
        if reading is None:
            reading = self._readings[digest] = _Reading(path)
            self._turns.enter(tenant, digest, first=first)
        else:
            self._turns.join(tenant, digest, first=first)
        reading.wanted = True
        reading.waiting.append(done)
        self._submit()

    def cancel(self, digest: str, done: Done) -> None:
        """`done` is not to be called any more. If nobody else waits, reading does not begin; once begun, it goes on."""
        reading = self._readings.get(digest)
        if reading is None or done not in reading.waiting:
            return
        reading.waiting.remove(done)
        if not reading.waiting and self._turns.leave(digest):
            del self._readings[digest]

    def read_now(self, digest: str, path: str) -> None:
        """Read an adapter into the host tier, waiting for the disk. Raises what reading raises."""
        started = self._clock()
        self._keep_read(self._read(digest, path), self._clock() - started)

    def forget(self, digest: str) -> None:
        """What is being read does not stay in the host tier, unless it is asked for again before it comes."""
        if digest in self._readings:
            self._readings[digest].wanted = False

    def forget_ranks(self, needed: Callable[[], Container[str]]) -> None:
        """Bound `ranks`: forget the older half of what is not in `needed`, which is only asked for if that is due."""
        if len(self.ranks) <= self._most_ranks:
            return
        kept = needed()
        unneeded = [digest for digest in self.ranks if digest not in kept]
        for digest in unneeded[: max(len(unneeded) // 2, len(unneeded) - REMEMBERED)]:
            del self.ranks[digest]
        self._most_ranks = len(self.ranks) + REMEMBERED // 2

    def check_integrity(self) -> None:
        """Raise RuntimeError unless everything that is awaited is under way."""
        if not len(self._readings) <= self._tasks <= self._loader.pending:
            raise RuntimeError(
                f"{len(self._readings)} adapters are awaited, {self._tasks} of {self._loader.pending} tasks read"
            )

    def _submit(self) -> None:
        while self._tasks < len(self._readings):
            self._tasks += 1
            self._loader.submit(self._read_next, self._finish)

    def _read_next(self) -> _Outcome:
        """Runs in a thread of the loader."""
        digest = self._turns.next()
        if digest is None:  # nobody waits for it any more
            return _Outcome(None)
        started = self._clock()
        try:
            packed: PackedAdapter | Exception = self._read(digest, self._readings[digest].path)
        except BaseException as error:  # whatever it is, this adapter's requests wait for it
            packed = as_exception(error)
        return _Outcome(digest, packed, self._clock() - started)

    def _finish(self, outcome: _Outcome | Exception) -> None:
        self._tasks -= 1
        if isinstance(outcome, Exception):  # the thread failed before it had begun
            outcome = _Outcome(self._turns.next(), outcome)
        if outcome.digest is not None:
            self._report(outcome.digest, outcome)
        self._submit()  # a task that found nothing to do may have counted as one for what came since

    def _report(self, digest: str, outcome: _Outcome) -> None:
        if isinstance(outcome.packed, PackedAdapter):
            result: PackedAdapter | RequestError = self._keep_read(outcome.packed, outcome.seconds)
        else:
            assert outcome.packed is not None
            result = self._failed(digest, outcome.packed)
        for done in self._readings.pop(digest).waiting:
            done(result)

    def _keep_read(self, packed: PackedAdapter, seconds: float) -> PackedAdapter:
        self.ranks[packed.digest] = packed.group_ranks
        self.seconds.append(seconds)
        reading = self._readings.get(packed.digest)
        if reading is None or reading.wanted:
            self._host.insert(packed, self._keep)
        return packed

    def _failed(self, digest: str, error: Exception) -> RequestError:
        if isinstance(error, TooManyPages):
            self.ranks[digest] = error.ranks  # whoever asks again is told without a look at the file
        return unavailable(digest, error)


def unavailable(digest: str, error: Exception) -> RequestError:
    """What those are told who wait for an adapter that could not be loaded."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, AdapterError | OSError):  # it was fine when it was registered
        message = str(error)
    else:
        logger.error("adapter %s could not be loaded", digest, exc_info=error)
        message = f"adapter {digest[:12]} could not be loaded"
    return RequestError(message, param="model", code="adapter_unavailable")


def start_loader(num_threads: int, device: torch.device) -> Loader:
    """Threads beside the steps, which allocate for the same device.

    They must not call `torch.set_num_threads`: MKL's number is the whole process's, and with 1 a first token took 550
    instead of 170 ms from the first load on (SmolLM2-135M, 2 cores).
    """

    def prepare() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)

    return ThreadLoader(num_threads, prepare)
