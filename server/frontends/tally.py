"""What all processes of a server have counted, those too that have ended."""

from prometheus_client import CollectorRegistry

from server.metrics_sum import Snapshot, counts_alone, decode, encode, snapshot, summed


class Tally:
    """Keeps what each front end told last, so that a sum never falls when one of them dies or is late.

    `registry` has what the parent counts itself.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._latest: dict[str, bytes] = {}
        self._ended = Snapshot(False, [])

    def note(self, front: str, data: bytes) -> None:
        """What a front end has counted so far."""
        if data:
            self._latest[front] = data

    def gone(self, front: str) -> None:
        """A front end is gone; what it told last goes on counting."""
        data = self._latest.pop(front, None)
        if data is not None:
            self._ended = Snapshot(False, summed([self._ended, counts_alone(decode(data))]))

    def others(self, front: str) -> list[bytes]:
        """What a front end needs beside its own numbers."""
        others = [data for name, data in self._latest.items() if name != front]
        return [*others, encode(self._ended), encode(snapshot(self._registry, is_parent=True))]
