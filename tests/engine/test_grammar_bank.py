"""Grammars in memory: compiled once, kept while they are used and as long as there is room, forgotten after that."""

import gc
import weakref
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.threads import NoThread
from server.engine.config import RequestError
from server.engine.constraint import Constraint, ConstraintKind
from server.engine.grammar import Grammar, GrammarError
from server.engine.grammar_bank import REFUSED_BYTES, GrammarBank
from tests.engine.manual_loading import ManualLoader

SIZE = 1000


def regex(source: str, param: str = "response_format") -> Constraint:
    return Constraint(ConstraintKind.REGEX, source, param)


class Factory:
    """Compiles everything but what begins with "bad"; grammars are of one size. `lacks`: what the system refuses."""

    def __init__(self) -> None:
        self.lacks: dict[str, Exception] = {}
        self.compiled: list[str] = []
        self.closed = False

    def compile(self, constraint: Constraint) -> Grammar:
        self.compiled.append(constraint.source)
        if constraint.source == "bug":
            raise KeyError("of the library")
        if constraint.source in self.lacks:
            raise self.lacks[constraint.source]
        if constraint.source.startswith("bad"):
            raise GrammarError("it is bad")
        nothing: Any = None
        return Grammar(nothing, nothing, 0.0, SIZE)

    def close(self) -> None:
        self.closed = True


def finish(loader: ManualLoader) -> None:
    while loader.tasks:
        loader.run()
    loader.poll()


def test_equal_constraints_are_compiled_once() -> None:
    loader, factory = ManualLoader(), Factory()
    bank = GrammarBank(loader, factory, 10 * SIZE)
    for param in ("response_format", "tools"):
        bank.enter(regex("a", param))
        bank.check_integrity()
    assert bank.get(regex("a")) is None
    assert bank.compiling
    finish(loader)
    assert bank.get(regex("a")) is bank.get(regex("a", "tools")) is not None
    bank.enter(Constraint(ConstraintKind.GRAMMAR, "a"))
    finish(loader)
    assert factory.compiled == ["a", "a"], "another kind is another grammar"


def test_a_refusal_names_the_field_of_whoever_asks_and_is_remembered() -> None:
    loader, factory = ManualLoader(), Factory()
    bank = GrammarBank(loader, factory, 10 * SIZE)
    for param in ("structured_outputs.regex", "tools"):
        constraint = regex("bad", param)
        bank.enter(constraint)
        finish(loader)
        with pytest.raises(RequestError) as refused:
            bank.get(constraint)
        assert (refused.value.param, refused.value.code) == (param, "invalid_constraint")
        assert str(refused.value) == f"{param}: it is bad"
        bank.leave(constraint)
        bank.check_integrity()
    assert factory.compiled == ["bad"]


def test_of_what_is_refused_nothing_but_the_reason_is_kept() -> None:
    class Tables:
        """What the library had built when it refused."""

    built: list[weakref.ref[Tables]] = []

    class Building(Factory):
        def compile(self, constraint: Constraint) -> Grammar:
            tables = Tables()
            built.append(weakref.ref(tables))
            return super().compile(constraint)

    loader = ManualLoader()
    bank = GrammarBank(loader, Building(), 10 * REFUSED_BYTES)
    bank.enter(regex("bad"))
    finish(loader)
    gc.collect()
    assert [tables() for tables in built] == [None]
    with pytest.raises(RequestError):
        bank.get(regex("bad"))


def test_a_bug_of_the_library_is_a_refusal(caplog: pytest.LogCaptureFixture) -> None:
    loader = ManualLoader()
    bank = GrammarBank(loader, Factory(), 10 * SIZE)
    bank.enter(regex("bug"))
    finish(loader)
    with pytest.raises(RequestError, match="it cannot be compiled"):
        bank.get(regex("bug"))
    assert "KeyError" in caplog.text


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NoThread("can't start new thread"), "can't start new thread"),
        (OSError(11, "again"), "again"),
        (MemoryError(), "MemoryError"),
    ],
)
@pytest.mark.parametrize("leaves_first", [False, True])
def test_what_the_system_refuses_is_tried_again_for_who_comes_later(
    error: Exception, said: str, leaves_first: bool
) -> None:
    loader, factory = ManualLoader(), Factory()
    bank = GrammarBank(loader, factory, 10 * SIZE)
    factory.lacks["a"] = error
    for _ in range(2):
        bank.enter(regex("a"))
    if leaves_first:
        for _ in range(2):
            bank.leave(regex("a"))
    finish(loader)
    bank.check_integrity()
    if not leaves_first:
        for _ in range(2):
            with pytest.raises(RequestError, match=said) as refused:
                bank.get(regex("a"))
            assert (refused.value.param, refused.value.code) == ("response_format", "constraint_unavailable")
            bank.leave(regex("a"))
            bank.check_integrity()
    assert not len(bank)
    del factory.lacks["a"]
    bank.enter(regex("a"))
    finish(loader)
    assert bank.get(regex("a")) is not None
    bank.check_integrity()


def test_the_least_recently_used_goes_first() -> None:
    loader, factory = ManualLoader(), Factory()
    bank = GrammarBank(loader, factory, 2 * SIZE)
    for source in "abcab":
        bank.enter(regex(source))
        finish(loader)
        bank.leave(regex(source))
        bank.check_integrity()
    assert len(bank) == 2
    assert factory.compiled == list("abcab"), "a and b had to make room for others"
    bank.enter(regex("a"))
    assert not loader.tasks


def test_what_is_used_stays_beyond_the_budget() -> None:
    loader = ManualLoader()
    bank = GrammarBank(loader, Factory(), 0)
    for source in "abc":
        bank.enter(regex(source))
    finish(loader)
    assert all(bank.get(regex(source)) is not None for source in "abc")
    bank.check_integrity()
    for source in "abc":
        bank.leave(regex(source))
    bank.check_integrity()
    assert not len(bank)


def test_a_request_may_leave_while_its_grammar_is_compiled() -> None:
    loader = ManualLoader()
    bank = GrammarBank(loader, Factory(), 10 * SIZE)
    bank.enter(regex("a"))
    bank.leave(regex("a"))
    bank.check_integrity()
    finish(loader)
    bank.check_integrity()
    assert len(bank) == 1
    assert not bank.compiling


STEPS = st.lists(
    st.tuples(st.sampled_from(["enter", "leave", "run"]), st.sampled_from(["a", "bb", "bad", "bad2", "full"]))
)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(0, 3 * SIZE + REFUSED_BYTES))
def test_whatever_comes_and_goes(steps: list[tuple[str, str]], budget: int) -> None:
    loader, factory = ManualLoader(), Factory()
    bank = GrammarBank(loader, factory, budget)
    users: list[str] = []
    for what, source in steps:
        if what == "enter":
            bank.enter(regex(source))
            users.append(source)
        elif what == "leave" and source in users:
            users.remove(source)
            bank.leave(regex(source))
        elif what == "run":
            factory.lacks = {"full": OSError("full")} if source == "full" else {}
            finish(loader)
            for one in set(users) - {"bad", "bad2", "full"}:
                assert bank.get(regex(one)) is not None
        bank.check_integrity()


def test_closing_closes_what_compiles() -> None:
    factory = Factory()
    GrammarBank(ManualLoader(), factory, 0).close()
    assert factory.closed
