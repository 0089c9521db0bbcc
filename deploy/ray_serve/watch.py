"""Keeps a front end's view of the engines up to date, over the same handle that requests take."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from deploy.ray_serve.fleet import Fleet
from deploy.ray_serve.wire import Hint, decode_report

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
ANSWER_SECONDS = 10.0
"""A replica that does not answer for so long counts as gone until it does."""


class Watch:
    """Asks the engines of `fleet` how they are; `front` is who asks.

    Serve does not tell who its replicas are, but its router can find one that is not known yet, and sends a call for
    one that is gone to another, whose answer says so.
    """

    def __init__(self, handle: DeploymentHandle, front: str, fleet: Fleet) -> None:
        self._front = front
        self._name = handle.name
        self._report = handle.report
        self._fleet = fleet

    async def run(self) -> None:
        """Look every second, until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.look()
            except Exception:
                logger.exception("the engines' state is not known")

    async def look(self) -> None:
        """Ask each known replica, and look for one that is new."""
        known = self._fleet.replicas
        await asyncio.gather(*(self._ask(replica) for replica in known), self._discover(known))

    async def _discover(self, known: Sequence[str]) -> None:
        replica = await _answer(self._name.remote(Hint(avoid=tuple(known))))
        if replica is not None and replica not in known:
            await self._ask(replica)

    async def _ask(self, replica: str) -> None:
        data = await _answer(self._report.remote(Hint(target=replica, front=self._front), self._fleet.version(replica)))
        report = decode_report(data) if data is not None else None
        if report is not None and report.replica == replica:
            self._fleet.heard(report)
        else:
            self._fleet.lost(replica)


async def _answer(response: DeploymentResponse) -> Any:
    """None if it does not come."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await response
    except (RayError, RayServeException, TimeoutError) as error:
        logger.warning("an engine does not report: %s", str(error).partition("\n")[0] or "it is silent")
        return None
