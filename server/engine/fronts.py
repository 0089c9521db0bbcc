"""The front ends of an engine process: whose each request, call and pin is, and what each of them is told."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import zmq

from server.engine.config import EngineStats
from server.engine.messages import Refusal, Reply, Submit, ToEngine, Update, decode_to_engine, encode
from server.engine.sequence import Output


@dataclass(eq=False)
class Front:
    """One front end, from its first message to its end. `requests` are those that have not ended."""

    name: bytes
    requests: set[str] = field(default_factory=set)
    refusals: list[Refusal] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)


class Fronts:
    """All front ends of one engine, on one ROUTER socket. What one asks nobody else can end, and nobody else hears of.

    A pin holds as long as one front end wants it.
    """

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self.socket = socket
        self._fronts: dict[bytes, Front] = {}
        self._gone: set[bytes] = set()
        self._owners: dict[str, Front] = {}
        self._pins: defaultdict[str, set[bytes]] = defaultdict(set)

    def receive(self) -> "tuple[Front, ToEngine] | None":
        """The next message, if one has come. What a front end said that is gone is not heard any more."""
        while True:
            try:
                name, data = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return None
            if name not in self._gone:
                front = self._fronts.get(name)
                if front is None:
                    front = self._fronts[name] = Front(name)
                return front, decode_to_engine(data)

    def acknowledge(self, received: "Iterable[tuple[Front, ToEngine]]") -> None:
        """Each front end hears which of its requests are about to be looked at."""
        taken: defaultdict[Front, list[str]] = defaultdict(list)
        for front, message in received:
            if isinstance(message, Submit):
                taken[front].append(message.request.id)
        for front, request_ids in taken.items():
            self.tell(front, Update(taken=request_ids))

    def begin(self, front: Front, request_id: str) -> bool:
        """A request is this front end's from now on, unless somebody has one of that id."""
        if request_id in self._owners:
            return False
        self._owners[request_id] = front
        front.requests.add(request_id)
        return True

    def end(self, request_id: str) -> None:
        """The request has ended, or was refused."""
        front = self._owners.pop(request_id, None)
        if front is not None:
            front.requests.discard(request_id)

    def want(self, front: Front, digest: str) -> None:
        """A front end pins an adapter."""
        self._pins[digest].add(front.name)

    def let_go(self, front: Front, digest: str) -> bool:
        """A front end does not pin it any more. Whether nobody does."""
        names = self._pins[digest]
        names.discard(front.name)
        if not names:
            del self._pins[digest]
        return not names

    def leave(self, name: bytes) -> Front | None:
        """This front end is gone: what it still had in hand, which nobody waits for any more, or None if nothing."""
        self._gone.add(name)
        front = self._fronts.pop(name, None)
        for request_id in front.requests if front is not None else ():
            del self._owners[request_id]
        return front

    def pins(self, front: Front) -> tuple[str, ...]:
        """What a front end pins."""
        return tuple(digest for digest, names in self._pins.items() if front.name in names)

    def report(self, outputs: Iterable[Output], residency: Mapping[str, str], stats: EngineStats | None) -> None:
        """Each front end gets what is its own, and all get the news of the engine."""
        mine: defaultdict[bytes, list[Output]] = defaultdict(list)
        for output in outputs:
            front = self._owners.get(output.request_id)
            if front is not None:  # else whoever asked is gone
                mine[front.name].append(output)
                if output.finish_reason is not None:
                    self.end(output.request_id)
        for name, front in self._fronts.items():
            refusals, front.refusals = front.refusals, []
            replies, front.replies = front.replies, []
            if mine[name] or refusals or replies or residency or stats is not None:
                self.tell(front, Update(mine[name], refusals, replies, dict(residency), stats))

    def tell(self, front: Front, update: Update) -> None:
        """Without a high-water mark this never waits; what is for one that is gone is dropped."""
        self.socket.send_multipart((front.name, encode(update)))
