"""What the records of one run say, in numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loadtests.records import OK, Record, by

Json = dict[str, Any]

PERCENTILES = (50, 90, 99)
FIRST_TOKEN_GOAL = 6.0
"""S-LoRA's: the share of first tokens within so many seconds is its SLO attainment."""


def jain(values: Sequence[float]) -> float | None:
    """Jain's fairness index (Jain et al. 1984): 1 where all are equal, 1/n where one has all, None for nothing."""
    total = sum(values)
    return total**2 / (len(values) * sum(value**2 for value in values)) if total else None


def report(records: Sequence[Record], goal: float = FIRST_TOKEN_GOAL) -> Json:
    """Figures of one run. `goal`: seconds within which a first token is in time.

    - `tokens_per_second`, `requests_per_second`: over the time from the first request to the last answer.
    - `slo_attainment`: requests whose first token came in time, of all; a failed one did not.
    - `fairness_tenants`: Jain's index of the tenants' tokens (prompt and output) a second while each had work.
    - `fairness_adapters`: Jain's index of the adapters' mean seconds an output token.
    - `late_ms`: how late the client itself was; figures of a client that cannot keep up are not the server's.
    """
    done = [record for record in records if record.status == OK]
    seconds = max((record.sent + record.end for record in records), default=0.0)
    in_time = sum(record.first is not None and record.first <= goal for record in done)
    tokens = sum(record.output_tokens for record in records)
    return {
        "requests": len(records),
        "statuses": dict(Counter(record.status for record in records)),
        "seconds": seconds,
        "output_tokens": tokens,
        "prompt_tokens": sum(record.prompt_tokens for record in done),
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "requests_per_second": len(done) / seconds if seconds else 0.0,
        "slo_seconds": goal,
        "slo_attainment": in_time / len(records) if records else None,
        "fairness_tenants": jain([_rate(own) for own in by(records, "tenant").values()]),
        "fairness_adapters": jain([mean for own in by(done, "adapter").values() if (mean := _pace(own)) is not None]),
        "late_ms": 1e3 * max((record.sent - record.at for record in records), default=0.0),
        "all": latencies(done),
        "cold": latencies([record for record in done if record.cold]),
        "warm": latencies([record for record in done if not record.cold]),
        "tenants": {name: latencies([r for r in own if r.status == OK]) for name, own in by(records, "tenant").items()},
    }


def latencies(records: Sequence[Record]) -> Json:
    """Milliseconds: `ttft` to the first token, `itl` between two, `e2e` to the end; percentiles and mean."""
    return {
        "requests": len(records),
        "ttft": _spread([record.first for record in records if record.first is not None]),
        "itl": _spread([gap for record in records for gap in record.gaps]),
        "e2e": _spread([record.end for record in records]),
    }


def compare(first: Json, second: Json) -> Json:
    """Ratios first / second, above 1 where the first is better: throughput, and inverse latencies.

    None where there is none, as of a run whose requests all failed.
    """
    tokens, others = first["tokens_per_second"], second["tokens_per_second"]
    found: Json = {"tokens_per_second": tokens / others if others else None}
    for name in ("ttft", "itl", "e2e"):
        for key in ("mean", *(f"p{percentile}" for percentile in PERCENTILES)):
            mine, other = first["all"][name].get(key), second["all"][name].get(key)
            found[f"{name}_{key}"] = other / mine if mine and other else None
    return found


def _spread(seconds: Sequence[float]) -> Mapping[str, float]:
    if not seconds:
        return {}
    found = np.percentile(np.array(seconds) * 1e3, PERCENTILES)
    return {"mean": 1e3 * float(np.mean(seconds))} | {
        f"p{percentile}": float(value) for percentile, value in zip(PERCENTILES, found, strict=True)
    }


def _rate(records: Sequence[Record]) -> float:
    """Tokens a second between a tenant's first request and its last answer."""
    seconds = max(record.sent + record.end for record in records) - min(record.sent for record in records)
    tokens = sum(record.output_tokens + record.prompt_tokens for record in records if record.times)
    return tokens / seconds if seconds else 0.0


def _pace(records: Sequence[Record]) -> float | None:
    tokens = sum(record.output_tokens for record in records)
    return sum(record.end for record in records) / tokens if tokens else None
