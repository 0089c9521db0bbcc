"""Where quotas are borrowed from: the registry, and while it does not answer this process alone."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from adapters_store.registry import BudgetGrant, BudgetWish, LocalBuckets, PlaceWish, RegistryUnavailable
from adapters_store.threads import Threads
from server.borrowed_bucket import BUDGET_SECONDS

ANSWER_SECONDS = 2.0
"""So long requests wait for the registry at most; and it is not asked again for as long as `PAUSE_SECONDS`."""
PAUSE_SECONDS = 5.0

logger = logging.getLogger(__name__)

Wishes = tuple[Sequence[BudgetWish], Sequence[PlaceWish]]
Grants = tuple[list[BudgetGrant], list[int]]


class Ledger(Protocol):
    """What budgets come from. Blocks. Raises RegistryUnavailable."""

    def exchange(self, wishes: Sequence[BudgetWish], place_wishes: Sequence[PlaceWish] = ()) -> Grants: ...

    def leave(self) -> None: ...


class Lender:
    """Carries wishes to the ledger: those that come while it is asked go together the next time.

    While it does not answer every process counts for itself. `clock` counts seconds. For one event loop.
    `budget_seconds`: so many seconds' worth is borrowed at most. What all hold is what a tenant may use beyond its
    quota at worst, so several processes of one server have a part of a second each.
    """

    def __init__(self, ledger: Ledger, clock: Callable[[], float], processes: int = 1) -> None:
        self.budget_seconds = BUDGET_SECONDS / processes
        self._ledger = ledger
        self._clock = clock
        self._alone = LocalBuckets(clock)
        self._waiting: list[tuple[Wishes, asyncio.Future[Grants]]] = []
        self._asking: asyncio.Task[None] | None = None
        self._thread = Threads(1, "budgets")
        self._pause_until = 0.0

    async def exchange(self, wishes: Sequence[BudgetWish], place_wishes: Sequence[PlaceWish]) -> Grants:
        """What is granted, in the order of the wishes."""
        if self._clock() < self._pause_until:
            return self._alone.exchange(wishes, place_wishes)
        answer: asyncio.Future[Grants] = asyncio.get_running_loop().create_future()
        self._waiting.append(((wishes, place_wishes), answer))
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await answer
        except (RegistryUnavailable, TimeoutError) as error:
            if self._clock() >= self._pause_until:
                logger.warning("quotas are counted by this process alone: %s", error or "the registry is slow")
            self._pause_until = self._clock() + PAUSE_SECONDS
            return self._alone.exchange(wishes, place_wishes)

    async def close(self) -> None:
        """This process holds nothing any more."""
        if self._asking is not None:
            await asyncio.wait({self._asking}, timeout=ANSWER_SECONDS)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await asyncio.get_running_loop().run_in_executor(self._thread, self._ledger.leave)
        except (RegistryUnavailable, TimeoutError) as error:
            logger.warning("places are kept until they expire: %s", error or "the registry is slow")
        self._thread.shutdown(wait=False)

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, []
            budgets = [wish for (wishes, _), _ in batch for wish in wishes]
            places = [wish for (_, wishes), _ in batch for wish in wishes]
            try:
                grants, held = await loop.run_in_executor(self._thread, self._ledger.exchange, budgets, places)
            except Exception as error:  # whatever it is, those who wait must hear of it
                failure = error if isinstance(error, RegistryUnavailable) else RegistryUnavailable(str(error))
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(failure)
                continue
            for (wishes, place_wishes), answer in batch:
                mine, grants = grants[: len(wishes)], grants[len(wishes) :]
                own, held = held[: len(place_wishes)], held[len(place_wishes) :]
                if not answer.done():
                    answer.set_result((mine, own))
