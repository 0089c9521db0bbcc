"""Which engine replica takes a call, as Ray Serve's request router asks."""

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deploy.ray_serve.wire import Hint


class AffinityRouter(RequestRouter):  # type: ignore[misc]
    """Looks at the `Hint` that is each call's first argument; of two replicas drawn the less loaded one takes it."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranked sets of replicas. Of the first that has room Serve takes the one with the shortest queue."""
        hint = _hint(pending_request)
        names = {replica: replica.replica_id.unique_id for replica in candidate_replicas}
        target = [replica for replica, name in names.items() if name == hint.target]
        wanted = [replica for replica, name in names.items() if name not in hint.avoid] or candidate_replicas
        return [target, random.sample(wanted, min(2, len(wanted))), wanted]


def _hint(request: PendingRequest | None) -> Hint:
    hint = request.args[0] if request is not None and request.args else None
    return hint if isinstance(hint, Hint) else Hint()
