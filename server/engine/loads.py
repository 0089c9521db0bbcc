"""Mixes on their way from host memory, or the disk behind it, to the device's pages."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from adapters_store.loader import Loader
from adapters_store.merge import fuse
from adapters_store.page_lease import Reservation
from adapters_store.pages import PackedAdapter
from adapters_store.pool import PagePool
from adapters_store.tiers import HostTier
from adapters_store.types import Composition, Mix
from adapters_store.upload import PageIds, Upload, Uploader, write_pages
from server.engine.config import RequestError
from server.engine.reads import Reads, unavailable


@dataclass(eq=False)
class Load:
    """One mix on its way. Once `done`, all its adapters were resident, or `error` says why they cannot be."""

    reservation: Reservation
    done: bool = False
    error: RequestError | None = None


@dataclass(eq=False)
class _Making:
    """A resident whose pages are reserved, while its adapters (one, or those of a fusion) are being gathered."""

    key: str
    entries: tuple[tuple[str, float], ...]
    fused: bool
    packed: dict[str, PackedAdapter] = field(default_factory=dict)


class Loads:
    """Reserves pages and has them written: on a CPU by the loader's thread, on a GPU by copies on a stream.

    Fusions are made by the loader's thread. Nothing here waits; what is under way moves on in `poll`.
    """

    def __init__(self, pool: PagePool, host: HostTier, reads: Reads, loader: Loader) -> None:
        self._pool = pool
        self._host = host
        self._reads = reads
        self._loader = loader
        self._uploader = Uploader(pool.tensors, pool.device) if pool.device.type == "cuda" else None
        self._loads: dict[str, Load] = {}
        self._making: dict[str, _Making] = {}
        self._uploads: dict[str, Upload] = {}

    def __len__(self) -> int:
        return len(self._loads)

    @property
    def uploading(self) -> bool:
        """Whether copies to a GPU are under way."""
        return bool(self._uploads)

    def get(self, mix: Mix) -> Load | None:
        """The load of `mix` that is under way, if there is one."""
        return self._loads.get(mix.digest)

    def start(self, mix: Mix, paths: Mapping[str, str], *, evict: bool = True, tenant: str = "") -> Load | None:
        """Load `mix`, which is not under way; None if its pages cannot be had now.

        `paths`: folders by digest, for adapters that have left host memory. Their ranks must be known. `evict` False:
        only into pages that are free. tenant: in whose turn what has to be read is read.
        """
        reservation = self._pool.reserve(mix, self._reads.ranks, evict=evict)
        if reservation is None:
            return None
        load = self._loads[mix.digest] = Load(reservation)
        fused = mix.composition is Composition.FUSION
        for key in reservation.missing:
            making = self._making[key] = _Making(key, mix.entries if fused else ((key, 1.0),), fused)
            for digest, _ in making.entries:
                packed = self._host.get(digest)
                if packed is not None:
                    self._gathered(making, digest, packed)
                else:
                    done = partial(self._gathered, making, digest)
                    self._reads.start(digest, paths[digest], done, tenant=tenant, first=True)
        return load

    def poll(self) -> None:
        """Take note of what has been copied, and settle the loads that are complete or have failed."""
        for key in [key for key, upload in self._uploads.items() if upload.done()]:
            self._filled(self._making[key], self._uploads.pop(key).packed)
        for digest, load in list(self._loads.items()):
            if load.error is not None or self._pool.holds(load.reservation.mix):
                del self._loads[digest]
                self._pool.settle(load.reservation)
                load.done = True

    def check_integrity(self) -> None:
        """Raise RuntimeError unless exactly what is being made is loading, each for a reason."""
        if not self._uploads.keys() <= self._making.keys():
            raise RuntimeError("copies are under way for what nobody makes")
        if any(self._pool.is_loaded(key) for key in self._making):
            raise RuntimeError("what is loaded is still being made")
        if len(self._making) > len(self._uploads) and not self._loader.pending:
            raise RuntimeError("something is being made, and nothing is under way for it")

    def _gathered(self, making: _Making, digest: str, packed: PackedAdapter | RequestError) -> None:
        """One of its adapters is in host memory; with the last one, the pages can be written."""
        if self._making.get(making.key) is not making:
            return  # another of its adapters could not be read
        if isinstance(packed, RequestError):
            self._fail(making, packed)
            return
        making.packed[digest] = packed
        if len(making.packed) < len(making.entries):
            return
        if self._uploader is None:
            pages = self._pool.pages_of(making.key)
            self._loader.submit(partial(self._write, making, pages), partial(self._written, making), urgent=True)
        elif making.fused:
            self._loader.submit(partial(self._packed, making), partial(self._fused, making), urgent=True)
        else:
            self._upload(making, packed)

    def _packed(self, making: _Making) -> PackedAdapter:
        """What the pages are to hold. Runs in a thread of the loader."""
        if not making.fused:
            return making.packed[making.key]
        terms = [(making.packed[digest], weight) for digest, weight in making.entries]
        return fuse(terms, self._pool.shape, self._pool.dtype, pinned=self._uploader is not None)

    def _write(self, making: _Making, pages: PageIds) -> PackedAdapter:
        """Runs in a thread of the loader: nobody else reads or writes these pages meanwhile."""
        packed = self._packed(making)
        write_pages(packed, pages, self._pool.tensors)
        return packed

    def _written(self, making: _Making, result: PackedAdapter | Exception) -> None:
        if isinstance(result, Exception):
            self._fail(making, self._refused(making, result))
        else:
            self._filled(making, result)

    def _fused(self, making: _Making, result: PackedAdapter | Exception) -> None:
        if isinstance(result, Exception):
            self._fail(making, self._refused(making, result))
        else:
            self._upload(making, result)

    def _upload(self, making: _Making, packed: PackedAdapter) -> None:
        assert self._uploader is not None
        try:
            self._uploads[making.key] = self._uploader.start(packed, self._pool.pages_of(making.key))
        except RuntimeError as error:  # as for lack of memory
            self._fail(making, unavailable(making.key, error))

    def _filled(self, making: _Making, packed: PackedAdapter) -> None:
        del self._making[making.key]
        self._pool.fill(making.key, packed.scales)

    def _fail(self, making: _Making, error: RequestError) -> None:
        del self._making[making.key]
        self._pool.fail(making.key)
        for load in self._loads.values():
            if making.key in load.reservation.keys:
                load.error = error

    def _refused(self, making: _Making, error: Exception) -> RequestError:
        """A fusion may be too large where its adapters are not: that is up to the request's weights."""
        if making.fused and isinstance(error, ValueError):
            return RequestError(str(error), param="lora.adapters")
        return unavailable(making.key, error)
