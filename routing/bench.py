"""`python -m routing.bench`: what routing costs past the encoder, by adapters and by what the tenant owns of them.

The encoder is a table of random unit vectors, and so are the prototypes: random directions leave a search nothing to
skip. Each request has a text of its own, so that no decision is remembered. The last line of the output is JSON.
"""

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapters_store.registry import Resolved
from routing.prototype_index import PrototypeIndex
from routing.retriever import Retriever, RetrieverDefaults
from routing.router import RouteQuery
from routing.router_options import RouterOptions

TENANT = "tenant"


class RandomEncoder:
    """Unit vectors drawn from a seed, whatever the text."""

    id = "random"

    def __init__(self, width: int, rng: np.random.Generator) -> None:
        self.width = width
        self._vectors = _unit(rng, 4096, width)
        self._next = 0

    async def embed(
        self,
        texts: Sequence[str],
        *,
        tenant: str = "",  # noqa: ARG002
        bulk: bool = False,  # noqa: ARG002
    ) -> NDArray[np.float32]:
        self._next += 1
        return self._vectors[[self._next % len(self._vectors)] * len(texts)]


class Names:
    """The part of the adapter store that a router asks, with every answer at hand."""

    def __init__(self, found: Mapping[str, Resolved]) -> None:
        self._found = found

    async def resolve(self, tenant: str, names: Sequence[str]) -> Mapping[str, Resolved]:  # noqa: ARG002
        return {name: self._found[name] for name in names if name in self._found}


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a route past the encoder. `own` of the visible `adapters` are the tenant's, the rest public."""

    adapters: int
    own: int
    others: int
    prototypes: int
    requests: int
    p50_ms: float
    p95_ms: float
    explain_p50_ms: float
    put_ms: float


async def measure(
    adapters: int, own: int, others: int, prototypes: int, width: int, requests: int, clock: Callable[[], float]
) -> Timing:
    """Route `requests` texts among `adapters` that one tenant sees, beside `others` of tenants whom it does not see."""
    rng = np.random.default_rng(0)
    index = PrototypeIndex(width)
    found: dict[str, Resolved] = {}
    started = clock()
    for number in range(adapters + others):
        name = f"adapter-{number:06d}"
        public = own <= number < adapters
        tenant = TENANT if number < own else "default" if public else f"other-{number % 100}"
        index.put(tenant, name, public, _unit(rng, prototypes, width))
        if number < adapters:
            found[name] = Resolved(tenant, name, f"{number:064x}", public, "", "")
    put = (clock() - started) / (adapters + others)
    store = Names(found)
    router = Retriever("bench", RandomEncoder(width, rng), index, store, RetrieverDefaults(), clock)  # type: ignore[arg-type]
    plain = [(await router.route(_query(f"text {number}"))).seconds for number in range(requests)]
    explained = [(await router.route(_query(f"why {number}", explain=True))).seconds for number in range(5)]
    p50, p95 = np.percentile(plain, [50, 95]) * 1e3
    explain_ms = float(np.median(explained)) * 1e3
    return Timing(adapters, own, others, prototypes, requests, float(p50), float(p95), explain_ms, put * 1e3)


def _query(text: str, explain: bool = False) -> RouteQuery:
    return RouteQuery(TENANT, "auto", text=text, options=RouterOptions(explain=explain))


def _unit(rng: np.random.Generator, count: int, width: int) -> NDArray[np.float32]:
    vectors = rng.standard_normal((count, width), np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and, last, the JSON, which also goes to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=_numbers, default=[100, 1000, 10_000], help="visible to the tenant")
    parser.add_argument("--prototypes", type=_numbers, default=[1, 4], help="of each adapter")
    parser.add_argument("--others", type=int, default=1000, help="adapters of tenants whom the tenant does not see")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    options = parser.parse_args(arguments)
    print(f"{'adapters':>9}{'own':>7}{'others':>8}{'prototypes':>12}{'p50 ms':>9}{'p95 ms':>9}{'explain ms':>12}")
    rows: list[Timing] = []
    for prototypes in options.prototypes:
        for adapters in options.adapters:
            for own in dict.fromkeys((min(10, adapters), adapters // 2, adapters)):
                row = asyncio.run(
                    measure(
                        adapters, own, options.others, prototypes, options.width, options.requests, time.perf_counter
                    )
                )
                rows.append(row)
                print(
                    f"{row.adapters:>9}{row.own:>7}{row.others:>8}{row.prototypes:>12}"
                    f"{row.p50_ms:>9.3f}{row.p95_ms:>9.3f}{row.explain_p50_ms:>12.2f}"
                )
    threads = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or "default"
    setup = {"width": options.width, "cpus": os.cpu_count(), "machine": platform.machine(), "blas_threads": threads}
    document = json.dumps({"setup": setup, "rows": [asdict(row) for row in rows]})
    if options.out is not None:
        options.out.write_text(document + "\n")
    sys.stdout.write(document + "\n")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
