"""Placement over replicas that come and go, and the request router that asks it."""

import asyncio
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.request_router import PendingRequest, ReplicaID

from deploy.ray_serve.affinity import AffinityRouter
from deploy.ray_serve.placing import ReplicaPlacement, Standing
from deploy.ray_serve.wire import Hint
from server.engine.placement import Placement, Wanted

X, Y = Wanted(("x",)), Wanted(("y",))


def standing(rank: int, *, alive: bool = True, requests: int = 0, free_pages: int = 1, **tiers: str) -> Standing:
    return Standing(rank, alive, requests, free_pages, tiers)


@pytest.fixture
def placing() -> ReplicaPlacement:
    return ReplicaPlacement(Placement(3, random.Random(0), slack=2), 3)


def test_a_request_goes_where_its_adapter_is_until_others_have_much_less_to_do(placing: ReplicaPlacement) -> None:
    assert placing.choose(X, ["a", "b"]) is None
    placing.seen({"a": standing(0, x="device"), "b": standing(1, y="host")})
    for number in range(3):
        assert placing.choose(X, ["a", "b"]) == "a"
        placing.begin(f"r{number}", X, "a")
    assert placing.choose(X, ["a", "b"]) == "b"
    placing.end("r0")
    assert placing.choose(X, ["a", "b"]) == "a"
    assert placing.choose(X, ["b"]) == "b"
    assert placing.choose(Y, ["a", "b", "new"]) == "b"


def test_a_report_replaces_the_one_before(placing: ReplicaPlacement) -> None:
    placing.seen({"a": standing(0, x="device", y="device"), "b": standing(1)})
    placing.seen({"a": standing(0, y="device"), "b": standing(1, x="host")})
    assert (placing.choose(X, ["a", "b"]), placing.choose(Y, ["a", "b"])) == ("b", "a")
    placing.seen({"a": standing(0, y="device", requests=9), "b": standing(1)})
    assert placing.choose(Y, ["a", "b"]) == "b"


def test_the_dead_the_unknown_and_those_of_too_high_a_rank_are_not_chosen(placing: ReplicaPlacement) -> None:
    placing.seen({"a": standing(0, alive=False, x="device"), "b": standing(1), "c": standing(3, x="device")})
    assert placing.choose(X, ["a", "b", "c", "d"]) == "b"
    assert placing.choose(X, ["a", "c", "d"]) is None


def test_who_takes_over_a_rank_has_its_own_adapters_only(placing: ReplicaPlacement) -> None:
    placing.seen({"a": standing(0, x="device"), "b": standing(1, y="device")})
    placing.begin("r", X, "a")
    placing.seen({"b": standing(0, y="device"), "c": standing(1)})
    placing.end("r")
    assert placing.choose(Y, ["b", "c"]) == "b"
    placing.seen({"b": standing(0), "c": standing(1, x="device")})
    assert placing.choose(X, ["b", "c"]) == "c"


def test_a_request_counts_once_wherever_it_was_meant_to_go(placing: ReplicaPlacement) -> None:
    placing.seen({"a": standing(0, x="host"), "b": standing(1, x="host")})
    for name in ("a", "b", "b", "gone"):
        placing.begin("r", X, name)
    placing.end("r")
    placing.end("r")
    assert len(placing) == 0
    for number in range(20):  # neither has more than the other
        name = placing.choose(X, ["a", "b"])
        assert name is not None
        placing.begin(str(number), X, name)
    assert len(placing) == 20
    placing.seen({})
    for number in range(20):
        placing.end(str(number))
    assert len(placing) == 0


class Replica:
    """What the router sees of one."""

    def __init__(self, name: str, stats: Standing | None) -> None:
        self.replica_id = ReplicaID(name, deployment_id=None)
        self.routing_stats = vars(stats) if stats is not None else {}
        self.max_ongoing_requests = 8

    async def get_queue_len(self, deadline_s: float) -> int:
        return int(deadline_s * 0)


class Result:
    """An answer under way."""

    def __init__(self) -> None:
        self.end: Callable[[object], None] = lambda _: None

    def add_done_callback(self, callback: Callable[[object], None]) -> None:
        self.end = callback


@pytest.fixture
async def router() -> AffinityRouter:
    deployment = SimpleNamespace(app_name="loramux", name="engines")
    router = AffinityRouter(deployment_id=deployment, handle_source=None, use_replica_queue_len_cache=True)
    router.initialize_state(engines=4, slack=0)
    return router


async def first(router: AffinityRouter, replicas: list[Any], request: PendingRequest) -> list[str]:
    ranked = await router.choose_replicas(replicas, request)
    assert {replica.replica_id.unique_id for replica in ranked[-1]} <= {each.replica_id.unique_id for each in replicas}
    return [replica.replica_id.unique_id for replica in ranked[0]]


def pending(hint: object) -> PendingRequest:
    return PendingRequest(args=[hint], kwargs={}, metadata=SimpleNamespace())


async def test_the_router_ranks_what_placement_chose_first_and_all_others_last(router: AffinityRouter) -> None:
    replicas: list[Any] = [Replica("a", standing(0)), Replica("b", standing(1, x="device")), Replica("new", None)]
    router.update_replicas(replicas)
    assert await first(router, replicas, pending(Hint(X, "r1"))) == ["b"]
    assert await first(router, replicas, pending(Hint(X, "r2", avoid=("b",)))) == ["a"]
    assert await first(router, replicas, pending(Hint(target="new"))) == ["new"]
    assert await first(router, replicas, pending(Hint(target="gone"))) == []
    (_, two, rest) = await router.choose_replicas(replicas, pending(Hint(avoid=("a", "b"))))
    assert [replica.replica_id.unique_id for replica in (*two, *rest)] == ["new", "new"]
    (_, two, rest) = await router.choose_replicas(replicas, pending("no hint"))
    assert (len(two), len(rest)) == (2, 3)


async def test_a_request_counts_from_the_choice_to_its_end(router: AffinityRouter) -> None:
    replicas: list[Any] = [Replica("a", standing(0, x="device")), Replica("b", standing(1, x="device"))]
    router.update_replicas(replicas)
    requests = [pending(Hint(X, f"r{number}")) for number in range(4)]
    chosen = [(await first(router, replicas, request))[0] for request in requests]
    assert sorted(chosen) == ["a", "a", "b", "b"]
    results = [Result() for _ in requests]
    for request, result in zip(requests, results, strict=True):
        router.on_request_routed(request, ReplicaID("a", deployment_id=None), result)
    other = pending(Hint(X, "other"))
    assert await first(router, replicas, other) == ["b"]
    for result in results:
        result.end(None)
    await asyncio.sleep(0)
    assert len(router._placing) == 1
    del requests, request  # they were routed: forgetting them ends nothing
    await asyncio.sleep(0)
    assert len(router._placing) == 1


async def test_a_request_that_gives_up_before_it_is_routed_counts_no_more(router: AffinityRouter) -> None:
    replicas: list[Any] = [Replica("a", standing(0))]
    router.update_replicas(replicas)
    request = pending(Hint(X, "r"))
    for _ in range(3):  # Serve asks again while nobody takes it
        await first(router, replicas, request)
    assert len(router._placing) == 1
    del request
    await asyncio.sleep(0)
    assert len(router._placing) == 0
