"""Which engine replica takes a call: Ray Serve's request router, with adapters, prompts and load in mind."""

import asyncio
import random
import weakref
from collections.abc import Sequence
from functools import partial

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from deploy.ray_serve.placing import ReplicaPlacement, Standing
from deploy.ray_serve.wire import Hint
from server.engine.placement import Placement


class AffinityRouter(RequestRouter):  # type: ignore[misc]
    """Looks at the `Hint` that is each call's first argument.

    A request goes where `Placement` puts it, by what replicas report (`EngineReplica.record_routing_stats`, which Serve
    brings here) and what this front end has sent them. A call with a target goes there, and any other one to the less
    busy of two. Serve itself looks for another replica when the one that was chosen is gone or takes no more.
    """

    def initialize_state(self, engines: int, slack: int) -> None:
        """Serve calls it once. `engines`: as many as there can be; `slack`: the placement's."""
        self._placing = ReplicaPlacement(Placement(engines, random.Random(), slack), engines)
        self._unrouted: dict[str, weakref.finalize[..., PendingRequest]] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Replicas have come, gone, or reported."""
        self._placing.seen(
            {_name(replica): Standing(**replica.routing_stats) for replica in replicas if replica.routing_stats}
        )
        super().update_replicas(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Sets of replicas, the best first. Of one that has room Serve takes the replica with the shortest queue."""
        hint = _hint(pending_request)
        others = [replica for replica in candidate_replicas if _name(replica) not in hint.avoid] or candidate_replicas
        target = hint.target if hint.wanted is None else self._place(hint, pending_request, others)
        first = [replica for replica in candidate_replicas if _name(replica) == target]
        return [first, random.sample(others, min(2, len(others))), others]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """A replica has taken a request, which need not be the one that was chosen."""
        hint = _hint(pending_request)
        if hint.wanted is None:
            return
        if (unrouted := self._unrouted.pop(hint.key, None)) is not None:
            unrouted.detach()
        self._placing.begin(hint.key, hint.wanted, replica_id.unique_id)
        result.add_done_callback(partial(self._end_soon, asyncio.get_running_loop(), hint.key))

    def _place(self, hint: Hint, request: PendingRequest | None, replicas: Sequence[RunningReplica]) -> str | None:
        """The replica for a request, which counts there from now on: requests that come at once see each other."""
        assert hint.wanted is not None
        name = self._placing.choose(hint.wanted, [_name(replica) for replica in replicas])
        if name is not None:
            self._placing.begin(hint.key, hint.wanted, name)
            if hint.key not in self._unrouted:  # who gives up before it is routed, says so by forgetting it
                end = partial(self._end_soon, asyncio.get_running_loop(), hint.key)
                self._unrouted[hint.key] = weakref.finalize(request, end)
                self._unrouted[hint.key].atexit = False
        return name

    def _end_soon(self, loop: asyncio.AbstractEventLoop, key: str, _: object = None) -> None:
        """From whichever thread."""
        loop.call_soon_threadsafe(self._end, key)

    def _end(self, key: str) -> None:
        self._unrouted.pop(key, None)
        self._placing.end(key)


def _name(replica: RunningReplica) -> str:
    return str(replica.replica_id.unique_id)


def _hint(request: PendingRequest | None) -> Hint:
    hint = request.args[0] if request is not None and request.args else None
    return hint if isinstance(hint, Hint) else Hint()
