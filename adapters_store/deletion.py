"""Deletion of names: at once for new uses, then for good when the last request that uses them has ended."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from adapters_store.leases import Leases, Name
from adapters_store.neighbours import Neighbours
from adapters_store.registry import NotFound, RegistryError, RegistryUnavailable

logger = logging.getLogger(__name__)

Mark = Callable[[str, str, bool], Awaitable[None]]
Remove = Callable[[str, str], Awaitable[tuple[str, ...]]]

_RETRY_SECONDS = 1.0


class AdapterInUse(RegistryError):
    """A name that is in use and that the caller does not want to wait for."""

    def __init__(self, name: str, leases: int) -> None:
        message = f"adapter {name!r} is in use by {leases} request{'s' * (leases != 1)}: try again when they have ended"
        super().__init__("adapter_in_use", message, 409)


class Deletions:
    """The deletions under way in one event loop.

    `mark(owner, name, deleting)` hides a name from everybody or shows it again; `remove(owner, name)` forgets it and
    returns the digests that nobody has then. Both raise NotFound, RegistryUnavailable. `on_gone` hears of each of these
    digests.
    """

    def __init__(self, mark: Mark, remove: Remove, leases: Leases, on_gone: Callable[[str], Awaitable[None]]) -> None:
        self.neighbours = Neighbours()
        self._mark = mark
        self._remove = remove
        self._leases = leases
        self._on_gone = on_gone
        self._closed: set[Name] = set()
        self._draining: dict[Name, asyncio.Task[None]] = {}
        self._reopening: dict[Name, asyncio.Task[None]] = {}

    def is_closed(self, owner: str, name: str) -> bool:
        """Whether the name may no longer be leased."""
        return (owner, name) in self._closed

    async def begin(self, owner: str, name: str, may_wait: bool) -> "asyncio.Task[None]":
        """Hide a name from every new use; the task ends when nobody has it any more.

        Raises AdapterInUse, and leaves everything as it is, if it is used and must not wait for that to end; should the
        registry fail at that very moment, the name is shown again as soon as it answers. A name that is hidden already
        is taken up from there. Raises NotFound, RegistryUnavailable.
        """
        await self._refuse_used(owner, name, may_wait)
        if (reopening := self._reopening.get((owner, name))) is not None:
            await asyncio.wait({reopening})
        await self._mark(owner, name, True)
        try:
            await self._refuse_used(owner, name, may_wait)
        except AdapterInUse:  # a request was faster
            await asyncio.shield(self._reopen(owner, name))
            raise
        return self.finish(owner, name)

    def finish(self, owner: str, name: str) -> "asyncio.Task[None]":
        """Remove a marked name as soon as nobody uses it."""
        task = self._draining.get((owner, name))
        if task is None:
            self._closed.add((owner, name))
            task = self._draining[owner, name] = asyncio.create_task(self._drain(owner, name))
            task.add_done_callback(_log_failure)
        return task

    async def close(self) -> None:
        """Stop. What is still in use is finished when a store opens the registry again."""
        tasks = (*self._draining.values(), *self._reopening.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def uses(self, owner: str, name: str) -> int:
        """How many leases of a name there are, here and elsewhere."""
        return self._leases.of_name(owner, name) + await self.neighbours.uses(owner, name)

    async def _refuse_used(self, owner: str, name: str, may_wait: bool) -> None:
        if may_wait or self.is_closed(owner, name):
            return
        count = await self.uses(owner, name)
        if count:
            raise AdapterInUse(name, count)

    def _reopen(self, owner: str, name: str) -> "asyncio.Future[None]":
        """Show a name again, however long that takes; done when it was tried once."""
        tried = asyncio.get_running_loop().create_future()
        task = self._reopening[owner, name] = asyncio.create_task(self._unmark_at_last(owner, name, tried))
        task.add_done_callback(_log_failure)
        return tried

    async def _unmark_at_last(self, owner: str, name: str, tried: "asyncio.Future[None]") -> None:
        try:
            while True:
                try:
                    return await self._mark(owner, name, False)
                except NotFound:
                    return None  # another process was faster
                except RegistryUnavailable as error:
                    logger.warning("adapter %r of tenant %r is not shown again yet: %s", name, owner, error)
                if not tried.done():
                    tried.set_result(None)
                await asyncio.sleep(_RETRY_SECONDS)
        finally:
            del self._reopening[owner, name]
            if not tried.done():
                tried.set_result(None)

    async def _drain(self, owner: str, name: str) -> None:
        try:
            await self._leases.idle(owner, name)
            await self.neighbours.idle(owner, name)
            gone = await self._remove_at_last(owner, name)
        finally:
            self._closed.discard((owner, name))  # from now on the name may be another adapter's
            del self._draining[owner, name]
        for digest in gone:
            await self._on_gone(digest)

    async def _remove_at_last(self, owner: str, name: str) -> tuple[str, ...]:
        while True:
            try:
                return await self._remove(owner, name)
            except NotFound:
                return ()  # another process was faster
            except RegistryUnavailable as error:
                logger.warning("adapter %r of tenant %r is not removed yet: %s", name, owner, error)
                await asyncio.sleep(_RETRY_SECONDS)


def _log_failure(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a deletion failed", exc_info=error)
