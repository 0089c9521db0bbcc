"""A request that may be begun again in another engine."""

from collections.abc import Callable
from dataclasses import replace

from server.engine.placement import Wanted
from server.engine.sequence import Output, Request

CLEARED_TOKENS = 2
"""A moved request that has so many tokens has outlived what its first engine died of: that had given out none of them,
though it may have computed one ahead."""


class Journey:
    """A request on its way through engines: what it may still ask for, and what its client has got of it."""

    def __init__(self, request: Request, clock: Callable[[], float]) -> None:
        self.request = request
        self.wanted = Wanted.by(request)
        self.moves = 0
        self.num_tokens = 0
        self._clock = clock
        self._end = None if request.timeout is None else clock() + request.timeout
        self._held: list[Output] = []

    def take(self, output: Output) -> list[Output]:
        """What the client gets now."""
        self._held.append(output)
        if not output.tokens and output.finish_reason is None:
            return []
        self.num_tokens += len(output.tokens)
        given, self._held = self._held, []
        return given

    def move(self) -> bool:
        """Begin anew in another engine; False if no time is left."""
        self.moves += 1
        self._held = []
        if self._end is not None:
            left = self._end - self._clock()
            if left <= 0:
                return False
            self.request = replace(self.request, timeout=left)
        return True
