"""How long a request will wait, and who is refused for it."""

import asyncio
from collections.abc import Callable

import pytest
from fakes import Harness
from hypothesis import given
from hypothesis import strategies as st

from server.errors import DeadlineTooNear, Unavailable
from server.tenants import Tenant
from server.waiting import FORGOTTEN, SAMPLES, Waiting

ONE, OTHER, HEAVY = Tenant("one"), Tenant("other"), Tenant("heavy", weight=3.0)


class Clock:
    """Seconds, as a test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def measured(gap: float, clock: Clock, most: int = 10_000) -> Waiting:
    """After one request was answered every `gap` seconds while another always waited."""
    waiting = Waiting(most, clock)
    waiting.enter(ONE)
    for _ in range(SAMPLES):
        clock.now += gap
        waiting.enter(ONE)
        waiting.leave(ONE, started=True)
    waiting.leave(ONE, started=False)
    return waiting


def test_the_wait_is_the_requests_ahead_times_the_time_between_two() -> None:
    waiting = measured(0.5, Clock())
    assert waiting.estimate(ONE) == 0.0, "nobody waits"
    for number in range(1, 5):
        waiting.enter(ONE)
        assert waiting.estimate(ONE) == pytest.approx((number + 1) * 0.5)


def test_tenants_take_turns_by_weight() -> None:
    waiting = measured(1.0, Clock())
    for _ in range(8):
        waiting.enter(ONE)
    assert waiting.estimate(OTHER) == pytest.approx(1.0), "a flood is not ahead of others"
    waiting.enter(OTHER)
    assert waiting.estimate(OTHER) == pytest.approx(3.0)
    waiting.enter(HEAVY)
    assert waiting.estimate(HEAVY) == pytest.approx(1 + 5 / 3)
    assert waiting.estimate(ONE) == pytest.approx(11.0), "never more than all that wait"


def test_who_cannot_be_in_time_is_refused_and_told_when() -> None:
    waiting = measured(1.0, Clock())
    for _ in range(9):
        waiting.enter(ONE)
    with pytest.raises(DeadlineTooNear, match="has 2 s, and would wait about 10 s") as refused:
        waiting.check(ONE, 2.0)
    assert refused.value.headers == {"Retry-After": "8"}
    waiting.check(ONE, 10.0)
    waiting.check(ONE, None)
    waiting.check(ONE, 2.0, is_urgent=True)
    waiting.check(OTHER, 2.0)


def test_nobody_is_refused_by_what_is_not_known() -> None:
    clock = Clock()
    waiting = Waiting(100, clock)
    for _ in range(50):
        waiting.enter(ONE)
    waiting.check(ONE, 0.001)
    waiting = measured(1.0, clock)
    waiting.enter(ONE)
    clock.now += FORGOTTEN + 1
    waiting.check(ONE, 0.001)


def test_idle_time_between_requests_is_no_wait() -> None:
    clock = Clock()
    waiting = Waiting(100, clock)
    for _ in range(SAMPLES):
        clock.now += 30.0
        waiting.enter(ONE)
        clock.now += 0.25
        waiting.leave(ONE, started=True)
    waiting.enter(ONE)
    assert waiting.estimate(ONE) == pytest.approx(0.5)


def test_a_full_queue() -> None:
    waiting = Waiting(1, Clock())
    waiting.enter(ONE)
    with pytest.raises(Unavailable, match="1 requests wait already"):
        waiting.check(OTHER, None)


@given(st.lists(st.tuples(st.sampled_from([ONE, OTHER, HEAVY]), st.floats(0.0, 5.0)), max_size=60), st.data())
def test_every_state_gives_a_wait_within_bounds(events: list[tuple[Tenant, float]], data: st.DataObject) -> None:
    clock = Clock()
    waiting, inside, longest = Waiting(1000, clock), list[Tenant](), 0.0
    for tenant, seconds in events:
        clock.now += seconds
        longest += seconds
        if inside and data.draw(st.booleans()):
            waiting.leave(inside.pop(), started=data.draw(st.booleans()))
        else:
            waiting.enter(tenant)
            inside.append(tenant)
        assert len(waiting) == len(inside)
        assert 0.0 <= waiting.estimate(tenant) <= (len(inside) + 1) * longest


async def test_over_http(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness()
    waiting = harness.services.generator.waiting
    body = {"model": "sql", "prompt": "Hi"}
    async with harness.client() as client:
        for _ in range(SAMPLES):
            assert (await client.post("/v1/completions", json=body)).status_code == 200
        assert len(waiting) == 0
        harness.engine.gate.clear()
        first = asyncio.create_task(client.post("/v1/completions", json=body))
        async with asyncio.timeout(60):
            while not len(waiting):
                await asyncio.sleep(0)
        refused = await client.post("/v1/completions", json=body | {"timeout": 1e-6})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "deadline_too_near")
        assert refused.json()["error"]["param"] == "timeout"
        assert refused.headers["retry-after"].isdigit()
        harness.engine.gate.set()
        assert (await first).status_code == 200
        assert len(waiting) == 0
    harness.check_all_given_back()
