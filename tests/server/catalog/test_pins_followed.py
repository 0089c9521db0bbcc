"""Pins follow what other processes have told the registry."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from adapters_store.registry import Resolved
from server.catalog.pins import Pins
from server.engine.adapter_calls import EngineUnavailable


class World:
    """A store that leases everything, and an engine with room for `room` pins."""

    def __init__(self, room: int = 9) -> None:
        self.room = room
        self.pinned: set[str] = set()
        self.leased = 0
        self.tries = 0
        self.is_down = False

    async def lease(self, _: str, adapters: Sequence[Resolved]) -> Any:
        self.leased += 1
        return SimpleNamespace(paths={adapter.digest: "folder" for adapter in adapters})

    def release(self, _: Any) -> None:
        self.leased -= 1

    async def pin(self, digest: str, _: str) -> bool:
        self.tries += 1
        if self.is_down:
            raise EngineUnavailable("it is being restarted")
        if len(self.pinned) >= self.room:
            return False
        self.pinned.add(digest)
        return True

    def unpin(self, digest: str) -> None:
        self.pinned.discard(digest)


def named(name: str, digest: str) -> Resolved:
    return Resolved("acme", name, digest, False, "c", "w")


async def test_what_another_process_pins_and_unpins() -> None:
    world = World()
    pins = Pins(world, world)  # type: ignore[arg-type]
    await pins.follow([named("a", "d1"), named("b", "d2")])
    assert world.pinned == {"d1", "d2"}
    await pins.follow([named("a", "d3"), named("b", "d2")])
    assert world.pinned == {"d2", "d3"}
    await pins.follow([named("b", "d2")])
    await pins.follow([named("b", "d2")])
    assert (world.pinned, world.leased) == ({"d2"}, 1)


async def test_an_engine_that_is_being_restarted_is_asked_again() -> None:
    world = World()
    pins = Pins(world, world)  # type: ignore[arg-type]
    world.is_down = True
    for _ in range(2):
        await pins.follow([named("a", "d1")])
    assert (world.tries, world.leased) == (2, 0)
    world.is_down = False
    await pins.follow([named("a", "d1")])
    assert (world.pinned, world.leased) == ({"d1"}, 1)


async def test_a_pin_that_the_registry_does_not_know_yet_stays_for_a_look() -> None:
    world = World()
    pins = Pins(world, world)  # type: ignore[arg-type]
    assert await pins.pin(named("new", "d1"))
    await pins.follow([])
    await pins.follow([named("new", "d1")])
    await pins.follow([])
    assert world.pinned == {"d1"}
    await pins.follow([])
    assert not world.pinned


async def test_without_room_it_is_tried_again_when_another_pin_goes() -> None:
    world = World(room=1)
    pins = Pins(world, world)  # type: ignore[arg-type]
    both = [named("a", "d1"), named("b", "d2")]
    for _ in range(5):
        await pins.follow(both)
    assert (world.pinned, world.tries) == ({"d1"}, 2)
    await pins.follow(both[1:])
    await pins.follow(both[1:])
    assert world.pinned == {"d2"}
