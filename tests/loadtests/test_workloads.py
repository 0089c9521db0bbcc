"""Workloads have the shapes that their papers and tools describe."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from loadtests.trace import Trace
from loadtests.workloads import adapter_name, fixed, flood, gamma_arrivals, llm_d, punica, punica_adapters, s_lora


def test_everything_follows_from_the_seed() -> None:
    for make in (
        lambda seed: s_lora(8, 5.0, 10.0, 0.3, seed=seed),
        lambda seed: punica("skewed", 50, seed=seed),
        lambda seed: fixed(20, 8, 8, rate=3.0, adapters=4, seed=seed),
        lambda seed: llm_d(5.0, 10.0, seed=seed),
        lambda seed: flood(10.0, 2.0, seed=seed),
    ):
        assert make(3) == make(3)
        assert make(3) != make(4)


@pytest.mark.parametrize("variation", [0.5, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_variation(variation: float) -> None:
    times = gamma_arrivals(50.0, 400.0, variation, np.random.default_rng(0))
    gaps = np.diff(times)
    assert times == sorted(times)
    assert max(times) < 400
    assert len(times) == pytest.approx(20_000, rel=0.05 * max(1, variation))
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(variation, rel=0.1)


def test_s_lora() -> None:
    trace = s_lora(100, 50.0, 200.0, alpha=1.0)
    uniform = Counter(request.adapter for request in trace.requests)
    assert len(uniform) == 100
    assert max(uniform.values()) < 3 * min(uniform.values())
    lengths = [(request.prompt_tokens, request.output_tokens) for request in trace.requests]
    assert (min(min(pair) for pair in lengths), max(max(pair) for pair in lengths)) == (8, 511)
    skewed = Counter(request.adapter for request in s_lora(100, 50.0, 200.0, alpha=0.1).requests)
    # n u^10 is below 1 for u < 100^-0.1 = 0.63
    assert skewed[adapter_name(0)] / skewed.total() == pytest.approx(0.63, abs=0.02)
    assert {request.adapter for request in s_lora(0, 5.0, 10.0).requests} == {None}


def test_punica_popularities() -> None:
    rng = np.random.default_rng(0)
    assert sorted(punica_adapters("distinct", 50, rng)) == list(range(50))
    assert punica_adapters("identical", 5, rng) == [0] * 5
    uniform = Counter(punica_adapters("uniform", 50, rng))
    assert len(uniform) == 8
    assert set(uniform.values()) <= {6, 7}
    shares = [count for _, count in sorted(Counter(punica_adapters("skewed", 1000, rng)).items())]
    assert sum(shares) == 1000
    assert all(first / second == pytest.approx(1.5, rel=0.1) for first, second in pairwise(shares[:7]))


def test_punica_is_a_closed_loop_within_the_context() -> None:
    trace = punica("uniform", 1024)
    assert trace.at_once == 32
    assert {request.at for request in trace.requests} == {0.0}
    assert all(3 <= request.prompt_tokens + request.output_tokens <= 2050 for request in trace.requests)
    # the median of the lognormal is 18, less the 1 of its location
    assert np.median([request.prompt_tokens for request in trace.requests]) == pytest.approx(17, abs=2)


def test_fixed_lengths() -> None:
    trace = fixed(6, 10, 20, adapters=4, assignment="round-robin", at_once=2)
    assert [request.adapter for request in trace.requests] == [adapter_name(index) for index in (0, 1, 2, 3, 0, 1)]
    assert {(r.at, r.prompt_tokens, r.output_tokens) for r in trace.requests} == {(0.0, 10, 20)}
    assert trace.at_once == 2
    timed = fixed(5000, 1, 1, rate=10.0, burstiness=0.25)
    gaps = np.diff([request.at for request in timed.requests])
    assert np.mean(gaps) == pytest.approx(0.1, rel=0.1)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(2.0, rel=0.15)


def test_llm_d_shares() -> None:
    trace = llm_d(100.0, 100.0)
    counts = Counter(request.adapter for request in trace.requests)
    total = counts.total()
    for index, share in enumerate((0.12,) * 5 + (0.06,) * 5 + (0.02,) * 5):
        assert counts[adapter_name(index)] / total == pytest.approx(share, abs=0.015)


def test_the_flood_is_one_tenants() -> None:
    trace: Trace = flood(20.0, 2.0, others=2, flood_requests=10)
    counts = Counter(request.tenant for request in trace.requests)
    assert counts["flood"] == 10
    assert trace.tenants == ("flood", "tenant-1", "tenant-2")
    assert {(r.tenant, r.adapter) for r in trace.requests} == {
        ("flood", adapter_name(0)),
        ("tenant-1", adapter_name(1)),
        ("tenant-2", adapter_name(2)),
    }
