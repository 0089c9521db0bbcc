"""Front ends as an engine replica knows them: when one is gone, nobody reads its answers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE_SECONDS = 60.0
"""A front end asks every second how the engine is, unless it waits for another engine that is gone."""


class Callers:
    """Which requests are whose. `clock` counts seconds; `abort` ends a request."""

    def __init__(self, clock: Callable[[], float], abort: Callable[[str], None]) -> None:
        self._clock = clock
        self._abort = abort
        self._heard: dict[str, float] = {}
        self._requests: dict[str, set[str]] = {}

    def heard(self, front: str) -> None:
        """A front end has called."""
        self._heard[front] = self._clock()

    @contextmanager
    def serving(self, front: str, request_id: str) -> Iterator[None]:
        """While a request of the front end is answered."""
        self.heard(front)
        requests = self._requests.setdefault(front, set())
        requests.add(request_id)
        try:
            yield
        finally:
            requests.discard(request_id)
            if not requests and self._requests.get(front) is requests:
                del self._requests[front]

    async def look(self) -> None:
        """End the requests of front ends that have been silent for too long: Ray does not when a caller has died."""
        latest = self._clock() - PATIENCE_SECONDS
        for front in [front for front, heard in self._heard.items() if heard < latest]:
            del self._heard[front]
            for request_id in tuple(self._requests.get(front, ())):
                self._abort(request_id)
