"""Where requests go: near what they need, within the stated bounds of load, and always to an engine that may be had."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapters_store.types import Composition, Mix
from server.engine.placement import IMBALANCE, SLACK, Placement, Wanted
from server.engine.prefixes import SHORTEST, PrefixTable, prompt_prefixes
from server.engine.prompt_routers import PromptUse
from server.engine.sequence import Request, SamplingParams

ALL = range(4)
DIGESTS = ("a", "b", "c", "d", "e")
PROMPT = tuple(range(2, 402))


def make(engines: int = 4, slack: int = SLACK) -> Placement:
    return Placement(engines, random.Random(0), slack)


def give(placement: Placement, engine: int, wanted: Wanted = Wanted(), times: int = 1) -> None:  # noqa: B008
    for _ in range(times):
        placement.begin(wanted, engine)


def test_the_adapter_decides_then_the_load() -> None:
    placement = make()
    placement.moved(2, "a", "device")
    placement.moved(1, "a", "host")
    give(placement, 2, times=SLACK)
    assert placement.choose(Wanted(("a",)), ALL) == 2
    give(placement, 2)  # now it is above the bound
    assert placement.choose(Wanted(("a",)), ALL) == 1
    placement.moved(2, "a", "disk")
    placement.moved(1, "a", "disk")
    assert placement.choose(Wanted(("a",)), (0, 2)) == 0


def test_an_adapter_on_its_way_counts_as_there() -> None:
    placement = make()
    give(placement, 3, Wanted(("a",)))
    assert {placement.choose(Wanted(("a",)), ALL) for _ in range(20)} == {3}
    placement.end(Wanted(("a",)), 3)
    assert len({placement.choose(Wanted(("a",)), ALL) for _ in range(50)}) == 4  # it never came


def test_of_a_mix_the_engine_that_lacks_least() -> None:
    placement = make()
    for engine, digests in ((0, "ab"), (1, "bc"), (2, "abc")):
        for digest in digests:
            placement.moved(engine, digest, "device")
    assert placement.choose(Wanted(("a", "b", "c")), ALL) == 2
    assert placement.choose(Wanted(("a", "b", "c")), (0, 3)) == 0


def test_a_new_adapter_goes_where_a_page_is_free() -> None:
    placement = make()
    for engine in (0, 1, 3):
        placement.reported(engine, 0, free_pages=0)
    assert {placement.choose(Wanted(("a",)), ALL) for _ in range(20)} == {2}


def test_a_prompt_goes_where_its_beginning_was_computed() -> None:
    placement = make()
    first = Wanted((), prompt_prefixes(b"key", PROMPT))
    give(placement, 1, first)
    longer = Wanted((), prompt_prefixes(b"key", (*PROMPT[:100], *range(3, 300))))
    assert {placement.choose(longer, ALL) for _ in range(20)} == {1}
    other = Wanted((), prompt_prefixes(b"another tenant's", PROMPT))
    assert placement.cost(other, 1) == placement.cost(other, 0)
    placement.lost(1)
    assert placement.cost(longer, 1) == placement.cost(longer, 0)


def test_without_a_prefix_cache_beginnings_do_not_matter() -> None:
    placement = Placement(2, random.Random(0), prefix_cache=False)
    wanted = Wanted((), prompt_prefixes(b"key", PROMPT))
    give(placement, 1, wanted)
    placement.end(wanted, 1)
    assert placement.cost(wanted, 0) == placement.cost(wanted, 1)


def test_two_are_drawn_and_the_less_loaded_takes_it() -> None:
    placement = make()
    give(placement, 0, times=3)
    chosen = [placement.choose(Wanted(), ALL) for _ in range(200)]
    assert set(chosen) == {1, 2, 3}  # the most loaded of four never wins a draw


def test_what_an_engine_reports_counts_if_it_is_more() -> None:
    """Other front ends give it requests as well."""
    placement = make(2)
    placement.reported(0, 7, free_pages=3)
    give(placement, 1, times=5)
    assert placement.choose(Wanted(), (0, 1)) == 1
    placement.reported(0, 4, free_pages=3)
    assert placement.choose(Wanted(), (0, 1)) == 0
    placement.lost(0)
    assert placement.load(0) == 0


def test_what_a_request_wants() -> None:
    mix = Mix.of([("d1", 0.5), ("d2", 0.5)], Composition.MIXTURE)
    request = Request("r", PROMPT, SamplingParams(), mix, {"d1": "p", "d2": "p"}, cache_key=b"k")
    wanted = Wanted.by(request)
    assert wanted.digests == ("d1", "d2")
    assert [tokens for _, tokens in wanted.prefixes] == [32, 64, 128, 256]
    routed = Request("r", PROMPT, SamplingParams(), cache_key=b"k", prompt_router=PromptUse("r", "p", (), False, 1))
    assert Wanted.by(routed).prefixes != Wanted.by(Request("r", PROMPT, SamplingParams(), cache_key=b"k")).prefixes


@given(st.lists(st.integers(0, 9), max_size=200), st.lists(st.integers(0, 9), max_size=200))
def test_beginnings_are_equal_where_the_tokens_are(first: list[int], second: list[int]) -> None:
    shared = set(prompt_prefixes(b"", first)) & set(prompt_prefixes(b"", second))
    common = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    common = min(len(first), len(second)) if common is None else common
    for prefixes, prompt in ((prompt_prefixes(b"", first), first), (prompt_prefixes(b"", second), second)):
        assert all(SHORTEST <= tokens < len(prompt) for _, tokens in prefixes)
    assert all(tokens <= common for _, tokens in shared)
    expected = {tokens for _, tokens in prompt_prefixes(b"", first) if tokens <= common and tokens < len(second)}
    assert {tokens for _, tokens in shared} == expected


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=2), st.integers(0, 3)), max_size=60))
def test_the_table_of_beginnings_is_bounded_and_forgets(added: list[tuple[bytes, int]]) -> None:
    table = PrefixTable(kept=5)
    for name, engine in added:
        table.add(((name, 32),), engine)
        assert table.cached(((name, 32),), engine) == 32
        assert len(table) <= 5
    table.forget(2)
    assert not any(table.cached(((name, 32),), 2) for name, _ in added)


class PlacementMachine(RuleBasedStateMachine):
    """Any traffic, residency and deaths: what is chosen is in bounds, and nothing is left when all has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.placement = make()
        self.running: list[tuple[Wanted, int]] = []
        self.reported = [0, 0, 0, 0]

    @rule(
        digests=st.lists(st.sampled_from(DIGESTS), max_size=3, unique=True),
        candidates=st.lists(st.sampled_from(ALL), min_size=1, unique=True),
        length=st.integers(0, 100),
    )
    def place(self, digests: list[str], candidates: list[int], length: int) -> None:
        wanted = Wanted(tuple(digests), prompt_prefixes(b"", PROMPT[:length]))
        before = {engine: self.placement.load(engine) for engine in candidates}
        chosen = self.placement.choose(wanted, candidates)
        mean = sum(before.values()) / len(before)
        assert chosen in candidates
        assert before[chosen] <= max(min(before.values()) + SLACK, IMBALANCE * mean)
        within = [e for e in candidates if before[e] <= self.placement.limit(candidates)]
        assert self.placement.cost(wanted, chosen) == min(self.placement.cost(wanted, e) for e in within)
        self.placement.begin(wanted, chosen)
        self.running.append((wanted, chosen))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        wanted, engine = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.placement.end(wanted, engine)

    @rule(
        engine=st.sampled_from(ALL), digest=st.sampled_from(DIGESTS), tier=st.sampled_from(["disk", "host", "device"])
    )
    def move(self, engine: int, digest: str, tier: str) -> None:
        self.placement.moved(engine, digest, tier)

    @rule(engine=st.sampled_from(ALL), requests=st.integers(0, 40), free=st.integers(0, 2))
    def report(self, engine: int, requests: int, free: int) -> None:
        self.placement.reported(engine, requests, free)
        self.reported[engine] = requests

    @rule(engine=st.sampled_from(ALL))
    def lose(self, engine: int) -> None:
        self.placement.lost(engine)
        self.reported[engine] = 0

    @invariant()
    def loads_are_what_runs(self) -> None:
        for engine in ALL:
            placed = sum(where == engine for _, where in self.running)
            assert self.placement.load(engine) == max(placed, self.reported[engine])

    def teardown(self) -> None:
        for wanted, engine in self.running:
            self.placement.end(wanted, engine)
        assert not any(seen.in_flight or seen.using for seen in self.placement._seen)


TestPlacement = PlacementMachine.TestCase
TestPlacement.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("loads", [(0, 0, 0, 9), (10, 10, 10, 10), (100, 30, 30, 30), (0, 8, 8, 8)])
def test_the_least_loaded_engine_is_always_in_bounds(loads: Sequence[int]) -> None:
    placement = make()
    for engine, load in enumerate(loads):
        give(placement, engine, times=load)
    assert min(loads) <= placement.limit(ALL) <= max(min(loads) + SLACK, int(IMBALANCE * sum(loads) / 4))
