"""The workloads that the field measures many adapters with, as traces; everything follows from a seed.

S-LoRA (arXiv 2311.03285, its benchmarks/trace.py), Punica (arXiv 2310.18547, benchmark_utils.py), vLLM's `bench serve`
and llm-d's regression test, written from their descriptions.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from loadtests.trace import Trace, TraceRequest

Popularity = Literal["distinct", "uniform", "skewed", "identical"]

PUNICA_SKEW = 1.5
"""Each adapter has so many times the requests of the next one."""

LLM_D_SHARES = (0.12,) * 5 + (0.06,) * 5 + (0.02,) * 5


def adapter_name(index: int) -> str:
    """The name that adapter `index` of a workload has on the server."""
    return f"load-{index:05}"


def gamma_arrivals(rate: float, seconds: float, variation: float, rng: np.random.Generator) -> list[float]:
    """Arrivals within `seconds` at `rate` a second, with gamma distributed gaps.

    `variation` is the gaps' coefficient of variation; 1 is a Poisson process. Burstiness b, as vLLM calls it, is
    variation b**-0.5.
    """
    shape = variation**-2
    count = int(rate * seconds * 2 + 10 * variation * (rate * seconds) ** 0.5 + 100)
    times = np.cumsum(rng.gamma(shape, 1.0 / (shape * rate), count))
    return [float(time) for time in times if time < seconds]


def s_lora(
    adapters: int,
    rate: float,
    seconds: float,
    alpha: float = 1.0,
    variation: float = 1.0,
    shortest: int = 8,
    longest: int = 512,
    seed: int = 42,
) -> Trace:
    """S-LoRA's synthetic workload: gamma arrivals, lengths uniform in [shortest, longest).

    Adapter floor(n u^(1/alpha)) for uniform u: uniform for alpha 1, fewer adapters take more for smaller alpha. With 0
    adapters all requests are for the base model.
    """
    rng = np.random.default_rng(seed)
    times = gamma_arrivals(rate, seconds, variation, rng)
    chosen = (rng.power(alpha, len(times)) * adapters).astype(int)
    lengths = rng.integers(shortest, longest, (2, len(times)))
    return Trace.of(
        TraceRequest(at, int(output), int(prompt), adapter=adapter_name(int(index)) if adapters else None)
        for at, index, prompt, output in zip(times, chosen, *lengths, strict=True)
    )


def punica(
    popularity: Popularity, requests: int = 1024, at_once: int = 32, longest: int = 2048, seed: int = 0
) -> Trace:
    """Punica's closed loop: all requests wait from the start, `at_once` run, first come first served.

    Prompts are lognormal (s 0.8, location -1, scale 18), the sum with the output uniform in [0, longest).
    """
    rng = np.random.default_rng(seed)
    prompts = np.clip(rng.lognormal(np.log(18), 0.8, requests) - 1, 1, longest - 2).astype(int)
    outputs = np.clip(rng.integers(0, longest, requests) - prompts, 2, None)
    chosen = punica_adapters(popularity, requests, rng)
    return Trace.of(
        (
            TraceRequest(0.0, int(output), int(prompt), adapter=adapter_name(index))
            for prompt, output, index in zip(prompts, outputs, chosen, strict=True)
        ),
        at_once,
    )


def punica_adapters(popularity: Popularity, requests: int, rng: np.random.Generator) -> list[int]:
    """The adapter of each request, in random order: all distinct, ceil(sqrt(n)) with equal shares, shares that fall by
    `PUNICA_SKEW` from one to the next, or a single one.
    """
    if popularity == "distinct":
        chosen = list(range(requests))
    elif popularity == "identical":
        chosen = [0] * requests
    elif popularity == "uniform":
        count = int(np.ceil(np.sqrt(requests)))
        chosen = [index % count for index in range(requests)]
    else:
        chosen, left = [], requests
        while left:
            share = max(1, round(left * (1 - 1 / PUNICA_SKEW)))
            chosen += [chosen[-1] + 1 if chosen else 0] * share
            left -= share
    return [chosen[place] for place in rng.permutation(requests)]


def fixed(
    requests: int,
    prompt_tokens: int,
    output_tokens: int,
    rate: float | None = None,
    burstiness: float = 1.0,
    adapters: int = 0,
    assignment: Literal["random", "round-robin"] = "random",
    at_once: int | None = None,
    seed: int = 0,
) -> Trace:
    """vLLM's `bench serve --dataset-name random`: one length, `rate` a second (None: all at once)."""
    rng = np.random.default_rng(seed)
    gaps = np.zeros(requests) if rate is None else rng.gamma(burstiness, 1.0 / (burstiness * rate), requests)
    in_turn = range(requests)
    chosen = rng.integers(0, max(adapters, 1), requests) if assignment == "random" else in_turn
    names = [adapter_name(int(index) % adapters) if adapters else None for index in chosen]
    return Trace.of(
        (
            TraceRequest(float(at), output_tokens, prompt_tokens, adapter=name)
            for at, name in zip(np.cumsum(gaps), names, strict=True)
        ),
        at_once,
    )


def llm_d(
    rate: float,
    seconds: float,
    tokens: int = 1024,
    shares: Sequence[float] = LLM_D_SHARES,
    seed: int = 0,
) -> Trace:
    """llm-d's regression mix: 15 adapters, five each with 12, 6 and 2 % of the requests; `tokens` in and out."""
    rng = np.random.default_rng(seed)
    times = gamma_arrivals(rate, seconds, 1.0, rng)
    chosen = rng.choice(len(shares), len(times), p=np.array(shares) / sum(shares))
    return Trace.of(
        TraceRequest(at, tokens, tokens, adapter=adapter_name(int(index)))
        for at, index in zip(times, chosen, strict=True)
    )


def flood(
    seconds: float,
    rate: float,
    others: int = 3,
    flood_requests: int = 64,
    prompt_tokens: int = 32,
    output_tokens: int = 32,
    seed: int = 0,
) -> Trace:
    """One tenant sends `flood_requests` at once; `others` more send `rate` a second each, all with equal requests.

    Tenant i uses adapter i: `flood` 0, `tenant-1` 1, and so on.
    """
    rng = np.random.default_rng(seed)
    asked = [TraceRequest(0.0, output_tokens, prompt_tokens, None, adapter_name(0), "flood")] * flood_requests
    for tenant in range(1, others + 1):
        for at in gamma_arrivals(rate, seconds, 1.0, rng):
            name = adapter_name(tenant)
            asked.append(TraceRequest(at, output_tokens, prompt_tokens, None, name, f"tenant-{tenant}"))
    return Trace.of(asked)
