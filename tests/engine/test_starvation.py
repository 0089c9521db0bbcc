"""Mixes whose pages stay missing: they get them, and that stops others no more than is their tenant's share."""

from collections import Counter
from dataclasses import replace

import pytest
from contest import Contest, contest, text
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_simulation import alone, request

from adapters_store.types import Mix
from server.engine.starvation import STARVATION_STEPS

SIZES = {"a": 1, "b": 1, "c": 1, "d": 2, "half": 5, "most": 8} | {f"all{number}": 10 for number in range(100)}
"""Of 10 pages."""


def pool(**settings: object) -> Contest:
    return contest(capacity=10, sizes=SIZES, **settings)


def ask(
    run: Contest, tenant: str, adapters: tuple[str, ...], waiting: int, max_tokens: int, weight: float = 1.0
) -> None:
    """Let a tenant have so many requests waiting, each with one of these adapters, or "" for none."""
    waits = sum(sequence.request.tenant == tenant for sequence in run.simulation.scheduler.waiting)
    for _ in range(waiting - waits):
        number = next(run.numbers)
        mix = Mix.of([(name, 1.0) for name in [adapters[number % len(adapters)]] if name])
        item = request(f"{tenant}{number}", text(number, 8), max_tokens=max_tokens, tenant=tenant, weight=weight)
        run.add(replace(item, mix=mix))


ALL = tuple(f"all{number}" for number in range(100))


def served_beside(flood_tokens: int, adapters: tuple[str, ...], others: int, steps: int = 800) -> float:
    """What the others are served beside a tenant that always asks for all pages, as a part of that without it."""
    totals = []
    for is_flooded in (False, True):
        run = pool(max_num_seqs=8)
        run.simulation.check_every = 200
        for _ in range(steps):
            if is_flooded:
                ask(run, "flood", ALL, 40, flood_tokens)
            for number in range(others):
                ask(run, f"modest{number}", adapters, 4, 20)
            run.simulation.step()
        served = run.served()
        totals.append(served.total() - served["flood"])
    return totals[1] / totals[0]


def test_requests_without_adapters_are_not_stopped_by_a_tenant_that_asks_for_all_pages() -> None:
    assert served_beside(200, ("",), 1) >= 0.8


@pytest.mark.parametrize("tokens", [1, 200])
@pytest.mark.parametrize(("others", "share"), [(1, 0.2), (4, 0.6)])
def test_whoever_asks_for_all_pages_stops_others_for_its_share_of_time(tokens: int, others: int, share: float) -> None:
    assert served_beside(tokens, ("a", "b"), others) >= share


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_large_mix_gets_its_pages_while_others_keep_coming(lookahead: bool) -> None:
    run = pool(max_num_seqs=8, lookahead=lookahead)
    for _ in range(20):
        ask(run, "small", ("a", "b", "d"), 8, 20)
        run.simulation.step()
    run.add(replace(request("large", 8, max_tokens=4, tenant="other"), mix=Mix((("most", 1.0),))))
    large = run.simulation.sequences["large"]
    for _ in range(STARVATION_STEPS + 30):
        ask(run, "small", ("a", "b", "d"), 8, 20)
        run.simulation.step()
    assert large.first_scheduled is not None
    run.finish()


def starving(*others: str, tenant: str = "t") -> Contest:
    """One sequence holds six of ten pages for long, and one that needs eight has waited until it starves."""
    run = pool(max_num_seqs=4)
    run.add(replace(request("holds", 8, max_tokens=150, tenant="holder"), mix=Mix((("d", 1.0), ("half", 1.0)))))
    run.simulation.step()
    run.add(replace(request("large", 8, tenant=tenant), mix=Mix((("most", 1.0),))))
    for _ in range(STARVATION_STEPS):
        run.simulation.step()
    assert run.simulation.scheduler.starvation.sequence is run.simulation.sequences["large"]
    for name in others:
        adapters = [(digest, 1.0) for digest in name]
        run.add(replace(request(name or "base", 8, max_tokens=2, tenant=f"u{name}"), mix=Mix.of(adapters)))
    return run


def running(run: Contest) -> set[str]:
    return {sequence.request.id for sequence in run.simulation.scheduler.running}


def test_what_leaves_room_is_admitted_meanwhile() -> None:
    """Eight of ten pages are to become free: two others may have them, and whoever needs none."""
    run = starving("a", "b", "c", "")
    run.simulation.step()
    assert running(run) == {"holds", "a", "b", "base"}
    run.simulation.step()
    run.simulation.step()
    assert "c" in running(run), "those before it have ended"
    run.finish()


def test_nothing_is_kept_off_for_one_that_has_left() -> None:
    run = starving("a", "b", "c")
    run.simulation.end("large", "abort")
    run.simulation.step()
    assert running(run) == {"holds", "a", "b", "c"}
    assert run.simulation.scheduler.starvation.sequence is None


def test_the_tenant_pays_for_rows_that_stay_free() -> None:
    run = starving("ab", "bc")
    queue = run.simulation.scheduler.waiting
    run.add(replace(request("all3", 8, tenant="z"), mix=Mix((("all3", 1.0),))))
    before = queue.counters["t"]
    run.simulation.step()
    assert running(run) == {"holds", "ab"}
    assert queue.counters["t"] - before == 2.0 * 1, "bc would have run, all3 would not"


def test_only_the_tenant_in_turn_keeps_others_off() -> None:
    """Two mixes are missing pages for as long: room is kept for that of the tenant that was served less."""
    run = pool(max_num_seqs=4)
    run.add(replace(request("holds", 8, max_tokens=150, tenant="holder"), mix=Mix((("all0", 1.0),))))
    run.simulation.step()
    for tenant in ("greedy", "poor"):
        run.add(replace(request(tenant, 8, tenant=tenant), mix=Mix((("most", 1.0),))))
    run.simulation.scheduler.waiting.counters["greedy"] += 1000.0
    for _ in range(STARVATION_STEPS):
        run.simulation.step()
    assert run.simulation.scheduler.starvation.sequence is run.simulation.sequences["poor"]
    run.finish()


def test_who_has_just_come_first_is_asked_before_a_richer_tenant_that_waits_for_long() -> None:
    run = starving(tenant="greedy")
    scheduler = run.simulation.scheduler
    scheduler.starvation.sequence = None
    scheduler.waiting.counters["greedy"] = 5.0
    run.add(replace(request("poor", 8, tenant="poor"), mix=Mix((("all1", 1.0),))))
    scheduler.waiting.counters["poor"] = 0.0
    run.simulation.step()
    assert scheduler.starvation.sequence is None
    for _ in range(STARVATION_STEPS - 1):
        run.simulation.step()
    assert scheduler.starvation.sequence is run.simulation.sequences["poor"]
    run.finish()


def test_a_tenant_whose_clients_give_up_each_time_loses_its_turn() -> None:
    run = starving(tenant="greedy")
    scheduler = run.simulation.scheduler
    scheduler.starvation.sequence = None
    scheduler.waiting.counters["greedy"] = 5.0
    for number in range(STARVATION_STEPS):
        run.add(replace(request(f"poor{number}", 8, tenant="poor"), mix=Mix((("all1", 1.0),))))
        scheduler.waiting.counters["poor"] = 0.0
        run.simulation.step()
        if "poor" not in {s.request.tenant for s in scheduler.running}:
            run.simulation.end(f"poor{number}", "abort")
    assert scheduler.starvation.sequence is run.simulation.sequences["large"]


def test_nobody_starves_twice_in_a_row() -> None:
    run = pool(max_num_seqs=4)
    run.add(replace(request("holds", 8, max_tokens=150, tenant="z"), mix=Mix((("all0", 1.0),))))
    run.simulation.step()
    for tenant in "pq":
        run.add(replace(request(tenant, 8, tenant=tenant), mix=Mix((("most", 1.0),))))
    scheduler = run.simulation.scheduler
    scheduler.starvation._last = "p"
    for _ in range(STARVATION_STEPS):
        run.simulation.step()
    assert scheduler.starvation.sequence is run.simulation.sequences["q"]
    run.simulation.end("q", "abort")
    run.simulation.step()
    assert scheduler.starvation.sequence is run.simulation.sequences["p"], "nobody else wants pages"


def test_a_tenant_that_holds_pages_and_was_served_less_is_not_kept_off() -> None:
    run = pool(max_num_seqs=4)
    run.add(replace(request("holds", 8, max_tokens=150, tenant="poor"), mix=Mix((("half", 1.0),))))
    run.simulation.step()
    run.add(replace(request("large", 8, tenant="greedy"), mix=Mix((("most", 1.0),))))
    counters = run.simulation.scheduler.waiting.counters
    for _ in range(STARVATION_STEPS + 5):
        counters["greedy"] = counters["poor"] + 1000.0
        run.simulation.step()
        assert run.simulation.scheduler.starvation.sequence is None
    counters["greedy"] = counters["poor"]
    run.simulation.step()
    assert run.simulation.scheduler.starvation.sequence is run.simulation.sequences["large"]
    run.finish()


def test_who_holds_the_pages_pays_for_rows_that_stay_free() -> None:
    run = pool(max_num_seqs=4)
    for name, digest in (("x", "half"), ("y", "d")):
        run.add(replace(request(name, 8, max_tokens=50, tenant=name), mix=Mix(((digest, 1.0),))))
    run.simulation.step()
    run.simulation.step()
    run.add(replace(request("large", 8, tenant="z"), mix=Mix((("most", 1.0),))))
    counters = run.simulation.scheduler.waiting.counters
    before = dict(counters)
    run.simulation.step()
    assert counters["x"] - before["x"] == pytest.approx(2.0 + 2.0 * 5 / 7)
    assert counters["y"] - before["y"] == pytest.approx(2.0 + 2.0 * 2 / 7)


tenants = st.fixed_dictionaries(
    {
        "adapters": st.lists(
            st.sampled_from(["", "a", "b", "d", "half", "most", "all1", "all2"]), min_size=1, max_size=3
        ),
        "waiting": st.integers(1, 5),
        "max_tokens": st.integers(1, 30),
        "weight": st.sampled_from([1.0, 1.0, 0.5, 2.0]),
    }
)


@given(
    works=st.lists(tenants, min_size=2, max_size=4),
    rows=st.integers(1, 6),
    lookahead=st.booleans(),
)
@settings(max_examples=8, deadline=None)
def test_every_tenant_is_served_whatever_pages_the_others_want(
    works: list[dict[str, object]], rows: int, lookahead: bool
) -> None:
    """Each always has requests waiting, and none of them waits for longer than all others' turns take."""
    run = pool(max_num_seqs=rows, lookahead=lookahead)
    turn = STARVATION_STEPS + 2 * 30 + 10
    longest: Counter[str] = Counter()
    for _ in range(600):
        for number, work in enumerate(works):
            ask(run, f"t{number}", tuple(work["adapters"]), work["waiting"], work["max_tokens"], work["weight"])  # type: ignore[arg-type]
        run.simulation.step()
        steps = run.simulation.steps
        for sequence in run.simulation.scheduler.waiting:
            if sequence.first_scheduled is None:
                tenant = sequence.request.tenant
                head = next(s for s in run.simulation.scheduler.waiting if s.request.tenant == tenant)
                longest[tenant] = max(longest[tenant], int(steps - head.arrival))
    for number, work in enumerate(works):
        share = float(work["weight"]) / sum(float(other["weight"]) for other in works)  # type: ignore[arg-type]
        assert longest[f"t{number}"] <= 5 * turn / share
    for sequence in run.sequences:
        if sequence.request.id in run.simulation.outputs:
            assert run.simulation.outputs[sequence.request.id] == alone(sequence.request)
