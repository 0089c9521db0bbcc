"""Slots for gates: routers come, go and wait; what runs keeps its gates, and nobody waits for ever."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.config import RequestError
from server.engine.gate_slots import GateSlots
from server.engine.gates import Gates, GateShape
from server.model.lora import LayerRouter


@dataclass
class Named:
    """Gates that are only a name."""

    name: str
    num_rows: int = 3
    targets: int = 127


@dataclass
class Memory:
    """What is in which slot."""

    shape: GateShape
    num_bytes: int = 0
    slots: dict[int, str] = field(default_factory=dict)

    def load(self, slot: int, gates: Gates) -> None:
        assert isinstance(gates, Named)
        assert 0 <= slot < self.shape.slots
        self.slots[slot] = gates.name

    def router(self, views: Any) -> LayerRouter:  # noqa: ARG002
        raise AssertionError("slots make no router")


def slots_of(count: int, patience: int = 64) -> tuple[GateSlots, Memory]:
    memory = Memory(GateShape(count, 32))
    return GateSlots(memory, patience), memory


def take(slots: GateSlots, name: str) -> int | None:
    found = slots.take(name, Named(name))
    slots.check_integrity()
    return found


def test_a_router_keeps_its_slot_until_another_needs_it() -> None:
    slots, memory = slots_of(2)
    first = take(slots, "a")
    assert take(slots, "a") == first
    slots.give_back("a")
    slots.give_back("a")
    second = take(slots, "b")
    assert second != first
    assert take(slots, "a") == first, "nobody needed it meanwhile"
    slots.give_back("a")
    assert take(slots, "c") == first, "the other one is in use"
    assert memory.slots == {first: "c", second: "b"}


def test_the_least_recently_used_goes_first() -> None:
    slots, memory = slots_of(2)
    for name in ("a", "b", "a"):
        take(slots, name)
        slots.give_back(name)
    take(slots, "c")
    assert sorted(memory.slots.values()) == ["a", "c"]


def test_who_waits_is_overtaken_a_few_times_only() -> None:
    slots, _ = slots_of(1, patience=2)
    assert take(slots, "a") == 0
    assert take(slots, "b") is None
    assert [take(slots, "a") for _ in range(4)] == [0, 0, None, None]
    assert take(slots, "c") is None
    for _ in range(3):
        slots.give_back("a")
    assert take(slots, "c") is None, "b came before"
    assert take(slots, "b") == 0
    assert take(slots, "c") is None


def test_whoever_gives_up_holds_nobody_back() -> None:
    slots, _ = slots_of(1, patience=0)
    take(slots, "a")
    assert take(slots, "b") is None
    assert take(slots, "a") is None
    slots.withdraw("b")
    assert take(slots, "a") == 0


def test_gates_that_no_slot_holds() -> None:
    slots, memory = slots_of(1)
    with pytest.raises(RequestError, match="33 gates a linear, but this engine has room for 32") as refusal:
        slots.take("a", Named("a", num_rows=33))
    assert (refusal.value.code, refusal.value.param) == ("router_unavailable", "lora.router")
    assert not memory.slots
    slots.check_integrity()


class Traffic:
    """Requests of some routers, in the order in which they came, as `Arrivals` polls them."""

    def __init__(self, count: int, patience: int) -> None:
        self.slots, self.memory = slots_of(count, patience)
        self.waiting: list[str] = []
        self.running: list[tuple[str, int]] = []

    def poll(self) -> None:
        for name in tuple(self.waiting):
            loaded = dict(self.memory.slots)
            slot = take(self.slots, name)
            for used, own in {own: used for used, own in self.running}.items():
                assert self.memory.slots[used] == own == loaded[used], "a slot in use has changed"
            if slot is None:
                continue
            self.waiting.remove(name)
            self.running.append((name, slot))
            assert self.memory.slots[slot] == name

    def end(self, number: int) -> None:
        everyone = [*self.running, *((name, None) for name in self.waiting)]
        name, slot = everyone[number % len(everyone)]
        if slot is None:
            self.waiting.remove(name)
        else:
            self.running.remove((name, slot))
            self.slots.give_back(name)
        if name not in self.waiting and name not in [own for own, _ in self.running]:
            self.slots.withdraw(name)
        self.slots.check_integrity()


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(0, 4),
    st.lists(st.sampled_from("abcde") | st.integers(0, 99) | st.none(), max_size=60),
)
def test_routers_come_go_and_wait(count: int, patience: int, events: list[str | int | None]) -> None:
    """A letter is a request that comes, a number one that ends; None is a step."""
    traffic = Traffic(count, patience)
    for event in events:
        if isinstance(event, str):
            traffic.waiting.append(event)
        elif event is None:
            traffic.poll()
        elif traffic.running or traffic.waiting:
            traffic.end(event)
    for _ in range(len(traffic.waiting) + 1):  # each round at least one gets in, since all others end
        traffic.poll()
        while traffic.running:
            traffic.end(0)
    assert not traffic.waiting


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(0, 5), st.integers(0, 2**16))
def test_steady_traffic_of_others_does_not_starve_a_router(count: int, patience: int, seed: int) -> None:
    """Requests of the resident routers keep coming, two a step, and each ends after a few steps."""
    traffic = Traffic(count, patience)
    residents = "abc"[:count]
    traffic.waiting += list(residents)
    traffic.poll()
    traffic.waiting.append("z")
    for step in range(8 * (patience + 4)):
        traffic.waiting += [residents[(step + seed) % count], residents[(step * 3 + seed) % count]]
        traffic.poll()
        if "z" not in traffic.waiting:
            return
        for _ in range(2):
            if traffic.running:
                traffic.end((seed + step) % len(traffic.running))
    raise AssertionError("z has waited for too long")
