"""A front end's engine in a process of its own, which the front end starts, and starts again when it dies."""

from server.engine.adapter_calls import EngineUnavailable as EngineUnavailable
from server.engine.config import EngineConfig
from server.engine.conversation import STALL_SECONDS, EngineConversation
from server.engine.engine_process import EngineProcess
from server.engine.suspects import Suspects

ONLY = "only"
"""The name of an engine's one front end."""


class EngineClient(EngineConversation):
    """A conversation with one engine, whose `process` belongs to it as well."""

    def __init__(
        self, config: EngineConfig, stall_seconds: float = STALL_SECONDS, suspects: Suspects | None = None
    ) -> None:
        """Clients whose requests move between their engines share their `suspects`."""
        self.suspects = suspects or Suspects()
        super().__init__(ONLY, self.suspects, stall_seconds)
        self.process = EngineProcess(config, self._started, self._ended)
        self.on_stuck = self.process.kill
        self.on_answered = self._proven

    @property
    def pid(self) -> int | None:
        """Process id of the engine, or None when none lives."""
        return self.process.pid

    @property
    def restarts(self) -> int:
        return self.process.restarts

    async def start(self) -> None:
        """Spawn the process and wait until the model is loaded. Raises EngineStartError."""
        await self.process.start()

    async def stop(self) -> None:
        """End the process; requests in flight end with an error."""
        await self.process.stop()
        await super().stop()

    async def _started(self) -> None:
        assert self.process.info is not None
        self.connect(self.process.address, self.process.info)

    async def _ended(self, reason: str) -> None:
        if self.alive and not self.process.is_stopping:
            self.suspects.crashed(self.in_flight())
        self.lost(reason)

    def _proven(self) -> None:
        self.process.has_answered = True
