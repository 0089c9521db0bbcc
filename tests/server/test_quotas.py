"""Quotas of tenants under a clock of the test's own."""

from collections import Counter
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.registry import Quotas, TenantRow
from server.errors import TooManyRequests
from server.quotas import Meter, QuotaGate, duration
from server.tenants import Tenants


class Gate(QuotaGate):
    """A gate with tenants that have these quotas, at the time `now`."""

    def __init__(self, **quotas: Quotas) -> None:
        self.now = 1000.0
        self.rejected: Counter[tuple[str, str]] = Counter()
        self.tenants = Tenants()
        for tenant, of_tenant in quotas.items():
            self.tenants.put(TenantRow(tenant, quotas=of_tenant))
        super().__init__(self.tenants, lambda: self.now, lambda tenant, kind: self.rejected.update([(tenant, kind)]))

    def run(self, tenant: str = "acme", prompt: int = 0) -> None:
        """A whole request."""
        self.knock(tenant)
        with self.admit(tenant) as meter:
            meter.reserve(prompt)

    def refusal(self, tenant: str = "acme", prompt: int = 0) -> TooManyRequests:
        with pytest.raises(TooManyRequests) as refused:
            self.run(tenant, prompt)
        return refused.value


class TestRequests:
    def test_the_burst_then_the_rate(self) -> None:
        gate = Gate(acme=Quotas(requests_per_second=3))
        for _ in range(3):
            gate.run()
        refusal = gate.refusal()
        assert (refusal.status, refusal.code, refusal.type) == (429, "quota_requests", "rate_limit_error")
        assert refusal.headers["Retry-After"] == "1"
        assert refusal.headers["x-ratelimit-limit-requests"] == "3"
        assert refusal.headers["x-ratelimit-remaining-requests"] == "0"
        assert refusal.headers["x-ratelimit-reset-requests"] == "1s"
        gate.now += 1 / 3
        gate.run()
        gate.refusal()
        assert gate.rejected == {("acme", "requests"): 2}

    def test_less_than_one_a_second(self) -> None:
        gate = Gate(acme=Quotas(requests_per_second=0.1))
        gate.run()
        assert gate.refusal().headers["Retry-After"] == "10"
        gate.now += 9.5
        assert gate.refusal().headers["Retry-After"] == "1"
        gate.now += 0.5
        gate.run()

    def test_endpoints_without_the_engine_count(self) -> None:
        gate = Gate(acme=Quotas(requests_per_second=1))
        gate.count_request("acme")
        with pytest.raises(TooManyRequests):
            gate.count_request("acme")
        gate.refusal()

    @given(st.floats(0.05, 50), st.lists(st.tuples(st.floats(0, 3), st.integers(0, 5)), max_size=60))
    def test_no_window_has_more_than_the_quota(self, rate: float, bursts: list[tuple[float, int]]) -> None:
        gate, admitted, waits = Gate(acme=Quotas(requests_per_second=rate)), list[float](), [0.0]
        for gap, count in bursts:
            gate.now += gap
            for _ in range(count):
                try:
                    gate.run()
                    admitted.append(gate.now)
                except TooManyRequests as refusal:
                    waits.append(refusal.retry_after)
        assert max(waits) <= max(1.0, 1 / rate) + 1e-6
        for first, start in enumerate(admitted):
            for last in range(first, len(admitted)):
                assert last - first + 1 <= max(1.0, rate) + rate * (admitted[last] - start) + 1e-6


class TestConcurrency:
    @given(st.integers(0, 4), st.lists(st.integers(-1, 4), max_size=80))
    def test_never_more_never_less(self, most: int, moves: list[int]) -> None:
        """-1 asks for a place, another number gives one back."""
        gate, running = Gate(acme=Quotas(concurrency=most)), list[ExitStack]()
        for move in moves:
            if move < 0:
                stack = ExitStack()
                try:
                    stack.enter_context(gate.admit("acme"))
                    running.append(stack)
                except TooManyRequests:
                    assert len(running) == most
            elif move < len(running):
                running.pop(move).close()
            assert gate.running("acme") == len(running) <= most
        for stack in running:
            stack.close()
        assert gate.running("acme") == 0

    def test_its_refusal(self) -> None:
        gate = Gate(acme=Quotas(concurrency=1))
        with gate.admit("acme"):
            refusal = gate.refusal()
        assert (refusal.status, refusal.code, refusal.headers["Retry-After"]) == (429, "quota_concurrency", "1")
        gate.run()

    def test_a_place_is_given_back_after_an_error(self) -> None:
        gate = Gate(acme=Quotas(concurrency=1, tokens_per_minute=10))
        assert gate.refusal(prompt=11).code == "quota_tokens"
        with pytest.raises(ZeroDivisionError), gate.admit("acme"):
            raise ZeroDivisionError
        gate.run()

    def test_who_is_refused_uses_no_request_up(self) -> None:
        gate = Gate(acme=Quotas(concurrency=2, requests_per_second=3))
        gate.knock("acme")
        with gate.admit("acme"):
            for _ in range(10):
                gate.knock("acme")
                with pytest.raises(TooManyRequests), gate.admit("acme", 2):
                    pass
            with gate.admit("acme"):
                assert {gate.refusal().code for _ in range(10)} == {"quota_concurrency"}
        gate.run()
        gate.run()
        assert gate.refusal().code == "quota_requests"

    @given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
    def test_sequences_count_not_requests(self, most: int, first: int, second: int) -> None:
        gate, refusals = Gate(acme=Quotas(concurrency=most)), list[tuple[str | None, bool, bool]]()

        def fits(sequences: int) -> bool:
            try:
                stack.enter_context(gate.admit("acme", sequences))
            except TooManyRequests as refusal:
                refusals.append((refusal.code, "x-should-retry" in refusal.headers, sequences > most))
                return False
            return True

        with ExitStack() as stack:
            running = first if fits(first) else 0
            assert (running > 0) == (first <= most)
            assert fits(second) == (running + second <= most)
        assert all(code == "quota_concurrency" and tells == never for code, tells, never in refusals)
        assert gate.running("acme") == 0


class TestTokens:
    def test_prompts_are_reserved_and_answers_charged(self) -> None:
        gate = Gate(acme=Quotas(tokens_per_minute=600))
        with gate.admit("acme") as meter:
            meter.reserve(400)
            for _ in range(300):  # a running answer is not cut
                meter.charge(1)
        assert gate.headers("acme") == {
            "x-ratelimit-limit-tokens": "600",
            "x-ratelimit-remaining-tokens": "0",
            "x-ratelimit-reset-tokens": "1m10s",
        }
        refusal = gate.refusal()
        assert refusal.code == "quota_tokens"
        assert refusal.headers["Retry-After"] == "11"  # 100 of debt and the first token, at 10 a second
        gate.now += 10.1
        gate.run(prompt=1)
        gate.now += 0.2
        assert gate.refusal(prompt=50).headers["Retry-After"] == "5"

    def test_what_was_not_used_is_given_back(self) -> None:
        gate = Gate(acme=Quotas(tokens_per_minute=60))
        with gate.admit("acme") as meter:
            meter.reserve(60)
            meter.give_back(60)
        gate.run(prompt=60)

    def test_a_prompt_beyond_the_quota_is_not_tried_again(self) -> None:
        refusal = Gate(acme=Quotas(tokens_per_minute=60)).refusal(prompt=61)
        assert refusal.code == "quota_tokens"
        assert (refusal.headers["Retry-After"], refusal.headers["x-should-retry"]) == ("60", "false")
        assert "61" in refusal.message

    @given(
        st.integers(1, 1000),
        st.lists(st.tuples(st.floats(0, 30), st.integers(0, 400), st.integers(0, 400), st.booleans()), max_size=60),
    )
    def test_over_time_no_more_than_the_quota_but_for_the_last_answers(
        self, quota: int, asked: list[tuple[float, int, int, bool]]
    ) -> None:
        """Prompts and answers together, some prompts given back, follow the quota as exact arithmetic does."""
        gate, level, last = Gate(acme=Quotas(tokens_per_minute=quota)), float(quota), 1000.0
        for gap, prompt, answer, fails in asked:
            gate.now += gap
            level = min(quota, level + (gate.now - last) * quota / 60)
            last = gate.now
            try:
                with gate.admit("acme") as meter:
                    meter.reserve(prompt)
                    if fails:
                        meter.give_back(prompt)
                    else:
                        meter.charge(answer)
                        level -= prompt + answer
                assert level + (0 if fails else prompt + answer) >= max(1, prompt) - 1e-6
            except TooManyRequests:
                assert level < max(1, prompt) + 1e-6


def test_tenants_do_not_share_quotas() -> None:
    gate = Gate(acme=Quotas(1, 60, 1), umbrella=Quotas(1, 60, 1), free=Quotas())
    with gate.admit("acme") as meter:
        meter.reserve(60)
        gate.refusal("acme")
        gate.run("umbrella", 60)
        for _ in range(100):
            gate.run("free", 10**9)
            gate.run("default", 10**9)
    assert gate.headers("free") == gate.headers("default") == {}
    assert gate.rejected == {("acme", "concurrency"): 1}


def test_quotas_that_change_count_what_runs_and_what_was_used() -> None:
    gate = Gate(acme=Quotas())
    with gate.admit("acme") as meter:
        gate.tenants.put(TenantRow("acme", quotas=Quotas(concurrency=1, tokens_per_minute=60)))
        assert gate.refusal().code == "quota_concurrency"
        meter.charge(30)
    gate.tenants.put(TenantRow("acme", quotas=Quotas(tokens_per_minute=120)))
    assert gate.headers("acme")["x-ratelimit-remaining-tokens"] == "90"
    gate.tenants.put(TenantRow("acme", quotas=Quotas(tokens_per_minute=12)))
    assert gate.headers("acme")["x-ratelimit-remaining-tokens"] == "12"
    gate.tenants.drop("acme")
    assert gate.headers("acme")["x-ratelimit-limit-tokens"] == "12"  # its requests that still run keep theirs


def test_quotas_of_nothing_let_nothing_through() -> None:
    gate = Gate(acme=Quotas(concurrency=0), umbrella=Quotas(tokens_per_minute=0))
    assert gate.refusal("acme").code == "quota_concurrency"
    assert gate.refusal("umbrella").code == "quota_tokens"


def test_the_wait_is_bounded() -> None:
    gate = Gate(acme=Quotas(requests_per_second=1e-300))
    gate.run()
    assert gate.refusal().headers["Retry-After"] == "86400"


def test_a_meter_without_quotas_shows_nothing() -> None:
    meter = Meter("acme", lambda: 0.0, lambda *_: None)
    meter.reserve(10**9)
    meter.give_back(10**9)
    assert meter.headers() == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0123, "13ms"),
        (0.9999, "1s"),
        (1.5, "1.5s"),
        (59.9999, "1m0s"),
        (360, "6m0s"),
        (3600, "1h0m0s"),
        (7323.25, "2h2m3.25s"),
        (float("inf"), "24h0m0s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
