"""What a front end makes of the engines' reports."""

from typing import Any

from deploy.ray_serve.fleet import Fleet
from deploy.ray_serve.moves import Moves
from deploy.ray_serve.wire import Report
from server.engine.config import EngineStats


def report(replica: str, tiers: dict[str, str] | None = None, **fields: Any) -> Report:
    alive, stalled, version = fields.pop("alive", True), fields.pop("stalled", False), fields.pop("version", 0)
    return Report(replica, alive, stalled, EngineStats(**fields), version, tiers or {})


def test_one_living_engine_is_enough() -> None:
    fleet = Fleet()
    assert not fleet.alive
    fleet.heard(report("a", alive=False, version=3))
    assert not fleet.alive
    fleet.heard(report("b", stalled=True))
    assert fleet.alive
    assert [(member.alive, member.stalled) for member in fleet.members] == [(False, False), (True, True)]
    fleet.lost("b")
    assert not fleet.alive
    assert (fleet.replicas, fleet.version("a"), fleet.version("b")) == (("a",), 3, 0)


def test_an_engine_has_a_number_while_it_is_known() -> None:
    fleet, told = Fleet(), []
    fleet.on_stats = lambda number, stats: told.append((number, stats.running))
    for replica, running in (("a", 1), ("b", 2), ("c", 3), ("b", 4)):
        fleet.heard(report(replica, running=running))
    fleet.lost("a")
    fleet.heard(report("d", running=5))
    fleet.heard(report("e", running=6))
    assert told == [(0, 1), (1, 2), (2, 3), (1, 4), (0, 0), (0, 5), (3, 6)]
    assert [member.stats.running for member in fleet.members] == [5, 4, 3, 6]


def test_an_adapter_is_where_it_is_nearest_and_changes_are_told_once() -> None:
    fleet, told = Fleet(), []
    fleet.on_residency = lambda digest, tier: told.append((digest, tier))
    fleet.heard(report("a", {"x": "device", "y": "host"}))
    fleet.heard(report("b", {"x": "host", "z": "disk"}))
    assert told == [("x", "device"), ("y", "host")]
    fleet.heard(report("a", {"x": "disk"}))
    fleet.heard(report("b", {"x": "device"}))
    fleet.lost("b")
    fleet.lost("a")
    fleet.lost("a")
    assert told[2:] == [("x", "host"), ("x", "device"), ("x", "disk"), ("y", "disk")]


def test_moves_are_told_once_and_what_is_on_disk_is_forgotten_first() -> None:
    moves = Moves(kept=2)
    moves.moved("x", "host")
    moves.moved("y", "disk")
    seen = moves.version
    assert moves.since(0) == {"x": "host", "y": "disk"}
    assert not moves.since(seen)
    moves.moved("x", "device")
    moves.moved("z", "host")
    assert moves.since(seen) == {"x": "device", "z": "host"}
    assert moves.since(0) == {"x": "device", "z": "host"}
    moves.moved("q", "host")
    assert moves.since(0) == {"x": "device", "z": "host", "q": "host"}
