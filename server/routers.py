"""The routers that choose from the prompt: the encoder's own, and trained ones, as the registry has them."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adapters_store.blobs import BlobError
from adapters_store.registry import NameTaken, NotFound, RegistryUnavailable, RouterRow
from adapters_store.store import AdapterStore
from routing.card_file import CARD_FILE, CHANGE_FILE, RouterFolderError, read_kind
from routing.encoder import EncoderProcess, EncoderUnavailable, ServedEncoder
from routing.encoder_model import EncoderError, encoder_id
from routing.prototype_index import PrototypeIndex
from routing.prototype_sync import PrototypeSync
from routing.retriever import Retriever, RetrieverDefaults
from routing.router import AUTO, Routers
from routing.router_folder import read_router
from server.errors import BadRequest, Unavailable, Unprocessable
from server.gated_routers import READERS, GatedRouters, Member
from server.router_folders import RouterFolders

logger = logging.getLogger(__name__)

RETRIEVER = "retriever"
"""The router that needs no training. Trained ones have names of their own."""
ENSURE_SECONDS = 10.0
"""So long a registration waits for its adapter to be routable, or its router to have all that are there; an encoder
that is still loading does it later."""


@dataclass(frozen=True)
class ServedRouter:
    """One router by similarity in use. `row` is the registry's, None for the one that needs no training."""

    name: str
    row: RouterRow | None
    encoder: ServedEncoder
    index: PrototypeIndex
    sync: PrototypeSync
    min_score: float
    following: "asyncio.Task[None]"


@dataclass(frozen=True)
class RouterState:
    """A router as the administrator sees it. `adapters` can be chosen now; `problem` says why it is not served, or not
    as it was trained. `members`: of one inside the model the adapters that it was trained for.
    """

    name: str
    kind: str
    row: RouterRow | None
    encoder: str | None
    min_score: float | None
    adapters: int
    problem: str | None = None
    members: tuple[Member, ...] = ()


class RouterService:
    """Keeps `routers`, by which requests are decided, equal to what the registry and the encoder have.

    Without an encoder process none that compares texts is served, and `routers` says why. Methods raise ServerError,
    BlobError and RegistryError. `folders` has trained routers' files; `defaults` gives the options of the encoder
    with this id, whose trained router was calibrated to a `min_score` or not. For one event loop; `clock` counts
    seconds.
    """

    def __init__(
        self,
        store: AdapterStore,
        routers: Routers,
        process: EncoderProcess | None,
        gated: GatedRouters,
        folders: RouterFolders,
        defaults: Callable[[str, float | None], RetrieverDefaults],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._routers = routers
        self._process = process
        self._gated = gated
        self._folders = folders
        self._defaults = defaults
        self._clock = clock
        self._served: dict[str, ServedRouter] = {}
        self._problems: dict[str, tuple[RouterRow, str]] = {}
        self._passing: set[str] = set()  # of the problems, those that may be gone at the next look
        self._changing = asyncio.Lock()

    async def start(self) -> None:
        """Start the encoder, which loads meanwhile, and serve what is there."""
        if self._process is not None:
            try:
                await self._process.start()
                await self._serve(RETRIEVER, None, None, None)
            except EncoderUnavailable as error:
                self._routers.absent = str(error)
                logger.warning("no router compares prompts: %s", error)
        await self.refresh()
        default = self._routers.default
        if default not in (None, RETRIEVER) and not self.exists(default):
            logger.warning("there is no router %r: until it is registered `auto` is refused", default)

    async def ready(self, seconds: float, name: str | None = None) -> None:
        """Wait, for so long at most, until the router `name`, or every one, can choose all adapters that are there."""
        waited = [served for served in self._served.values() if name in (None, served.name)]
        work = [asyncio.ensure_future(_complete(served)) for served in waited]
        if work:
            _, late = await asyncio.wait(work, timeout=seconds)
            for task in late:
                task.cancel()
                logger.warning("some adapters can be chosen only later: the encoder is still reading their samples")

    async def close(self) -> None:
        """No decisions after this."""
        for name in (*self._served, *self._gated.served):
            await self._drop(name)
        if self._process is not None:
            await self._process.close()

    def exists(self, name: str) -> bool:
        """Whether requests can name this router."""
        return name in self._served or name in self._gated.served

    async def refresh(self) -> None:
        """Follow the registry: other processes add and remove routers too."""
        async with self._changing:
            try:
                rows = {row.name: row for row in await asyncio.to_thread(self._store.registry.routers.list)}
                used = {name: each.row for name, each in self._served.items()}
                used |= {name: each.row for name, each in self._gated.served.items()}
                kept = {n: p for n, p in self._problems.items() if rows.get(n) == p[0] and n not in self._passing}
                self._problems, self._passing = kept, set()
                for name, row in used.items():
                    if row is not None and rows.get(name) != row and not await self._replace(rows.get(name)):
                        await self._drop(name)
                for name, row in rows.items():
                    if not self.exists(name) and name not in self._problems:
                        await self._try(row)
                await self._gated.refresh()
            except RegistryUnavailable as error:
                logger.warning("routers stay as they are: %s", error)

    async def add(self, name: str, folder: Path, *, replace: bool = False) -> RouterState:
        """Store and serve the trained router in `folder`, which nobody else changes meanwhile."""
        if name in (RETRIEVER, AUTO):
            raise BadRequest(f"name: {name!r} is reserved, expected another name", param="name", code="invalid_name")
        kind = await self._check(folder)
        meta = json.loads(await asyncio.to_thread((folder / CARD_FILE).read_text, "utf-8"))
        taken = await asyncio.to_thread(self._store.registry.routers.list)
        if not replace and any(row.name == name for row in taken):
            raise NameTaken("router", f"router {name!r} exists: expected a new name, or replace")
        blob = await asyncio.to_thread(self._store.blobs.put_file, folder / CHANGE_FILE)
        row = RouterRow(name, kind, blob.sha256, meta)
        row = await asyncio.to_thread(self._store.registry.routers.add, row, replace_existing=replace)
        logger.info("router %r is registered, of kind %s", name, kind)
        await self.refresh()
        await self.ready(ENSURE_SECONDS, name)
        if self.exists(name) or name in self._problems:
            return self.state(name)
        return RouterState(name, kind, row, None, None, 0, "the registry does not answer: it will be served later")

    async def remove(self, name: str) -> None:
        """Forget a trained router, and what was made for it."""
        if name == RETRIEVER:
            raise BadRequest(f"name: {name!r} is built in and stays", param="name", code="invalid_name")
        served = self._served.get(name)
        await asyncio.to_thread(self._store.registry.routers.remove, name)
        await self.refresh()
        others = {each.encoder.id for each in self._served.values()}
        if served is not None and served.encoder.id not in others:
            await asyncio.to_thread(self._store.registry.prototypes.forget, served.encoder.id)

    def state(self, name: str) -> RouterState:
        """One router. Raises NotFound."""
        served, gated = self._served.get(name), self._gated.served.get(name)
        if served is not None:
            return RouterState(name, RETRIEVER, served.row, served.encoder.id, served.min_score, len(served.index))
        if gated is not None:
            count, row = gated.num_current, gated.row
            return RouterState(name, row.kind, row, None, None, count, gated.problem, gated.members)
        if name not in self._problems:
            raise NotFound("router", name)
        row, problem = self._problems[name]
        return RouterState(name, row.kind, row, None, None, 0, problem)

    def states(self) -> tuple[RouterState, ...]:
        """All routers by name, also those that are registered and cannot be served."""
        return tuple(self.state(name) for name in sorted({*self._served, *self._gated.served, *self._problems}))

    async def follow(self, tenant: str, name: str) -> None:
        """An adapter was registered, or changed, or deleted: what it means counts in the next request."""
        try:
            await self._gated.refresh(name)
        except RegistryUnavailable as error:
            logger.warning("whether routers over adapter %r are stale is not known yet: %s", name, error)
        served = tuple(self._served.values())
        if not served:
            return
        work = asyncio.gather(*(each.sync.ensure(tenant, name) for each in served))
        done, _ = await asyncio.wait({asyncio.ensure_future(work)}, timeout=ENSURE_SECONDS)
        if not done:
            logger.warning("adapter %r of tenant %r can be chosen once the encoder is ready", name, tenant)

    async def _check(self, folder: Path) -> str:
        """The kind of the trained router in `folder`, which can be served. Raises Unprocessable, Unavailable."""
        try:
            kind = await asyncio.to_thread(read_kind, folder)
            if kind in READERS:
                await self._gated.check(kind, folder)
                return kind
            if kind != RETRIEVER:
                raise RouterFolderError(f"{CARD_FILE}: field kind: expected one of {RETRIEVER}, {', '.join(READERS)}")
            process = self._needed()
            await asyncio.to_thread(read_router, folder)
            await asyncio.to_thread(encoder_id, process.folder, folder)
        except RouterFolderError as error:
            raise Unprocessable(f"the router cannot be served: {error}", code="router_bad_folder") from error
        except EncoderError as error:
            raise Unprocessable(f"the router cannot be served: {error}", code="router_wrong_encoder") from error
        return kind

    def _needed(self) -> EncoderProcess:
        if self._process is None or RETRIEVER not in self._served:
            raise Unavailable(f"no router can be served: {self._routers.absent}", code="no_router")
        return self._process

    async def _try(self, row: RouterRow) -> None:
        try:
            folder = await asyncio.to_thread(self._folders.make, row)
            if row.kind in READERS:
                await self._gated.serve(row, folder)
                return
            self._needed()
            score = row.meta.get("min_score")
            await self._serve(row.name, row, folder, float(score) if isinstance(score, int | float) else None)
        except (EncoderUnavailable, Unavailable, RouterFolderError, BlobError, OSError) as error:
            self._problems[row.name] = (row, str(error))
            if isinstance(error, BlobError | OSError):
                self._passing.add(row.name)
            logger.warning("router %r cannot be served: %s", row.name, error)

    async def _serve(self, name: str, row: RouterRow | None, change: Path | None, min_score: float | None) -> None:
        assert self._process is not None
        encoder = await asyncio.to_thread(self._process.encoder, change)
        defaults = self._defaults(encoder.id, min_score)
        index = PrototypeIndex(encoder.width)
        sync = PrototypeSync(self._store, encoder, index)
        following = asyncio.create_task(sync.run())
        self._served[name] = ServedRouter(name, row, encoder, index, sync, defaults.min_score, following)
        self._routers.put(Retriever(name, encoder, index, self._store, defaults, self._clock))

    async def _replace(self, row: RouterRow | None) -> bool:
        """Serve a router inside the model anew without a moment in which there is none. Whether that was done."""
        if row is None or row.kind not in READERS or row.name not in self._gated.served:
            return False
        await self._try(row)
        return row.name not in self._problems

    async def _drop(self, name: str) -> None:
        if name in self._gated.served:
            self._gated.drop(name)
            return
        self._routers.drop(name)
        served = self._served.pop(name)
        served.following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await served.following


async def _complete(served: ServedRouter) -> None:
    try:
        await served.sync.refresh()
        await served.sync.embed_missing()
    except RegistryUnavailable as error:
        logger.warning("prototypes cannot be read: %s", error)
