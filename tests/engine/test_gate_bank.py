"""Gates in memory: read once, kept while they are used and a little longer, forgotten after that."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.config import RequestError
from server.engine.gate_bank import GateBank
from server.engine.gates import GateUse
from tests.engine.manual_loading import ManualLoader


def use(digest: str) -> GateUse:
    return GateUse(digest, f"/routers/{digest}", ("a",), 1, 1.0)


class Shelf:
    """Folders of gates; those in `broken` cannot be read."""

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.read: list[str] = []

    def __call__(self, path: str) -> Any:
        name = path.rpartition("/")[2]
        self.read.append(name)
        if name in self.broken:
            raise ValueError(f"{path}: router.safetensors is damaged")
        return f"gates of {name}"


def finish(loader: ManualLoader) -> None:
    while loader.tasks:
        loader.run()
    loader.poll()


def test_gates_are_read_once_for_all_who_come() -> None:
    loader, shelf = ManualLoader(), Shelf()
    bank = GateBank(loader, shelf)
    for _ in range(3):
        bank.enter(use("a"))
        bank.check_integrity()
    assert bank.get("a") is None
    finish(loader)
    assert bank.get("a") == "gates of a"
    bank.enter(use("a"))
    assert shelf.read == ["a"]
    assert not loader.tasks


def test_what_cannot_be_read_says_why_and_is_tried_again() -> None:
    loader, shelf = ManualLoader(), Shelf()
    bank = GateBank(loader, shelf)
    shelf.broken.add("a")
    bank.enter(use("a"))
    finish(loader)
    with pytest.raises(RequestError, match="damaged") as refusal:
        bank.get("a")
    assert (refusal.value.code, refusal.value.param) == ("router_unavailable", "lora.router")
    bank.leave(use("a"))
    shelf.broken.clear()
    bank.enter(use("a"))
    finish(loader)
    assert bank.get("a") == "gates of a"


def test_the_least_recently_used_are_forgotten() -> None:
    loader, shelf = ManualLoader(), Shelf()
    bank = GateBank(loader, shelf, kept=2)
    for name in ("a", "b", "a", "c"):
        bank.enter(use(name))
        finish(loader)
        bank.leave(use(name))
        bank.check_integrity()
    assert len(bank) == 2
    bank.enter(use("a"))
    assert bank.get("a") == "gates of a"
    assert shelf.read == ["a", "b", "c"]
    assert bank.get("b") is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["enter", "leave", "finish"])), max_size=40))
def test_any_history(history: list[tuple[str, str]]) -> None:
    loader, shelf = ManualLoader(), Shelf()
    shelf.broken.add("d")
    bank, users = GateBank(loader, shelf, kept=1), dict.fromkeys("abcd", 0)
    for name, action in history:
        if action == "enter":
            bank.enter(use(name))
            users[name] += 1
        elif action == "leave" and users[name]:
            bank.leave(use(name))
            users[name] -= 1
        elif action == "finish":
            finish(loader)
            for used in (each for each, count in users.items() if count and each != "d"):
                assert bank.get(used) == f"gates of {used}"
        bank.check_integrity()
