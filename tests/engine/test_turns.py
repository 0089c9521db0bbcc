"""Lines of tenants that take turns."""

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.turns import Turns


def test_tenants_take_turns_and_each_line_is_in_order() -> None:
    turns = Turns()
    for key in ("a1", "a2", "a3", "b1", "b2", "c1"):
        turns.enter(key[0], key)
    assert [turns.next() for _ in range(7)] == ["a1", "b1", "c1", "a2", "b2", "a3", None]


def test_a_key_of_two_tenants_comes_when_the_first_of_them_has_its_turn() -> None:
    turns = Turns()
    for key in ("a1", "a2", "a3", "a4"):
        turns.enter("a", key)
    turns.enter("b", "b1")
    turns.join("b", "a4", first=True)
    assert [turns.next() for _ in range(6)] == ["a1", "a4", "a2", "b1", "a3", None]
    turns.join("b", "a4")
    assert turns.next() is None, "it was given out"


def test_what_has_left_does_not_come() -> None:
    turns = Turns()
    turns.enter("a", "a1")
    turns.enter("a", "a2")
    turns.join("b", "a1")
    assert turns.leave("a1")
    assert not turns.leave("a1")
    assert turns.next() == "a2"
    assert not turns.leave("a2")
    assert turns.next() is None


@given(
    st.lists(st.tuples(st.sampled_from(["enter", "join", "leave", "next"]), st.sampled_from("abc"), st.integers(0, 9)))
)
@settings(max_examples=100, deadline=None)
def test_every_key_comes_once_and_no_tenant_waits_for_two_of_another(steps: list[tuple[str, str, int]]) -> None:
    turns, lines = Turns(), defaultdict[str, set[str]](set)
    given_to_others: defaultdict[str, int] = defaultdict(int)
    for action, tenant, number in steps:
        key = str(number)
        in_line = any(key in line for line in lines.values())
        if action == "enter" and not in_line:
            turns.enter(tenant, key)
            lines[tenant].add(key)
        elif action == "join":
            turns.join(tenant, key)
            if in_line:
                lines[tenant].add(key)
        elif action == "leave":
            assert turns.leave(key) == in_line
            for line in lines.values():
                line.discard(key)
        elif action == "next":
            found = turns.next()
            assert (found is None) == (not any(lines.values()))
            for name, line in lines.items():
                given_to_others[name] = 0 if found in line or not line else given_to_others[name] + 1
                assert given_to_others[name] <= 2, "both others had their turns"
                line.discard(found or "")
