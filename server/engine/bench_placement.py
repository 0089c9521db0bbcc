"""What placement is worth, in a simulation: `python -m server.engine.bench_placement`.

Requests for adapters of power-law popularity (S-LoRA's synthetic workload: Sheng et al., 2023) come to several engines
with device pages for a part of them. Placement is set beside three that know no adapters, and beside an oracle: one
engine with the rows and the pages of all, which evicts as they do. `clairvoyant` is what no eviction in that much
memory can exceed. The same again for conversations, in which each turn's prompt repeats all before it, so that the KV
of prompts counts, too. Prints Markdown, and one JSON document as the last line.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import count, product
from typing import Any

import numpy as np

from server.engine.bench_measure import percentile
from server.engine.conversations import Talk, conversations
from server.engine.placement import Placement
from server.engine.placement_simulation import (
    Arrival,
    Choose,
    EngineSize,
    Outcome,
    Placed,
    clairvoyant_hits,
    simulate,
)
from server.engine.workload import gamma_arrivals, popular

Json = dict[str, Any]

SHORTEST, LONGEST = 8, 512
SETUPS = ((64, 12), (256, 32), (1000, 32), (1000, 64))
"""(adapters, pages of each engine, in adapters)"""
TALK_SETUPS = ((8, 12), *SETUPS)
"""Of the first, every engine may have all adapters: what is left is where a conversation's KV is."""
LOADS = (0.3, 0.7)
"""Shares of all rows that are busy on average."""
COLUMNS = ("oracle", "placement", "least loaded", "round robin", "random")


@dataclass(frozen=True)
class Options:
    """Sizes. `step`, `load` and `block` are seconds of a decode step, of an adapter's way to the device and of 16
    tokens of a prompt; `blocks` of 16 tokens have room in an engine's KV. `warm` is the share of requests that come
    before anything is counted.
    """

    engines: int = 4
    rows: int = 64
    requests: int = 20_000
    alpha: float = 1.0
    variation: float = 1.0
    step: float = 0.02
    load: float = 0.05
    block: float = 0.0016
    blocks: int = 8192
    warm: float = 0.25
    seed: int = 0


Traffic = Callable[[Options, int, float], list[Arrival]]
"""(options, adapters, share of busy rows) -> requests"""


def workload(options: Options, adapters: int, load: float) -> list[Arrival]:
    """Gamma arrivals that keep a share `load` of all rows busy; output lengths are uniform in [8, 512)."""
    rate = _rate(options, load)
    lengths = np.random.default_rng([options.seed, 5]).integers(SHORTEST, LONGEST, options.requests).tolist()
    times = gamma_arrivals(options.requests, rate, options.seed, options.variation)
    chosen = popular(options.requests, adapters, options.alpha, options.seed)
    return [
        Arrival(at, str(adapter), length * options.step)
        for at, adapter, length in zip(times, chosen, lengths, strict=True)
    ]


def talks(options: Options, adapters: int, load: float) -> list[Arrival]:
    """Conversations with answers of the same lengths, as many turns a second."""
    talk = Talk(answer=(SHORTEST, LONGEST), step=options.step)
    rate = _rate(options, load)
    return conversations(talk, options.requests, rate, adapters, options.alpha, options.seed, options.variation)


def _rate(options: Options, load: float) -> float:
    """Requests a second that keep a share `load` of all rows busy with their answers."""
    return load * options.engines * options.rows / (options.step * (SHORTEST + LONGEST - 1) / 2)


def measure(options: Options, adapters: int, pages: int, load: float, traffic: Traffic = workload) -> Json:
    """Every policy with the same requests."""
    arrivals = traffic(options, adapters, load)
    row: Json = {"adapters": adapters, "pages": pages, "load": load}
    size = EngineSize(options.rows, pages, options.load, options.blocks, options.block)
    for name, choose in _blind(options).items():
        row[name] = _figures(options, simulate(arrivals, options.engines, size, choose))
    placement = Placement(options.engines, random.Random(options.seed))
    row["placement"] = _figures(options, simulate(arrivals, options.engines, size, Placed(placement).choose, placement))
    row["oracle"] = _figures(options, simulate(arrivals, 1, size.times(options.engines), lambda *_: 0))
    row["share_of_oracle"] = row["placement"]["hits"] / row["oracle"]["hits"]
    row["clairvoyant"] = clairvoyant_hits([each.digest for each in arrivals], options.engines * pages)
    return row


def _blind(options: Options) -> dict[str, Choose]:
    """Policies that do not look at adapters."""
    draw, turns = random.Random(options.seed), count()
    return {
        "random": lambda _, loads: draw.randrange(len(loads)),
        "round robin": lambda _, loads: next(turns) % len(loads),
        "least loaded": lambda _, loads: min(range(len(loads)), key=lambda each: (loads[each], draw.random())),
    }


def _figures(options: Options, outcome: Outcome) -> Json:
    warm = int(options.warm * options.requests)
    hits, waits, imbalances = (part[warm:] for part in (outcome.hits, outcome.waits, outcome.imbalances))
    prompts = sum(outcome.prompts[warm:])
    return {
        "hits": sum(hits) / len(hits),
        "prefix_hits": sum(outcome.cached[warm:]) / prompts if prompts else 0.0,
        "imbalance": sum(imbalances) / len(imbalances),
        "imbalance_p99": percentile(imbalances, 99),
        "wait_p99_s": percentile(waits, 99),
    }


def markdown(rows: Sequence[Json]) -> str:
    """Hits of every policy, and of two the load of the most loaded engine over the mean and what requests waited."""
    head = ["adapters", "pages each", "busy rows", *(f"{name}: hits" for name in COLUMNS), "of the oracle's"]
    head += ["clairvoyant", *(f"{name}: load / mean (p99), p99 wait" for name in ("placement", "least loaded"))]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [f"{row['adapters']:,}", str(row["pages"]), f"{row['load']:.0%}"]
        cells += [f"{row[name]['hits']:.1%}" for name in COLUMNS]
        cells += [f"{row['share_of_oracle']:.1%}", f"{row['clairvoyant']:.1%}"]
        for figures in (row["placement"], row["least loaded"]):
            cells.append(f"{figures['imbalance']:.2f} ({figures['imbalance_p99']:.2f}), {figures['wait_p99_s']:.1f} s")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def talks_markdown(rows: Sequence[Json]) -> str:
    """Hits of adapters and, of the prompts' tokens, those whose KV was there, of every policy."""
    head = ["adapters", "pages each", "busy rows", *(f"{name}: adapter, prefix hits" for name in COLUMNS)]
    head += ["of the oracle's", "placement: load / mean (p99), p99 wait"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [f"{row['adapters']:,}", str(row["pages"]), f"{row['load']:.0%}"]
        cells += [f"{row[name]['hits']:.1%}, {row[name]['prefix_hits']:.1%}" for name in COLUMNS]
        cells.append(f"{row['share_of_oracle']:.1%}, {share_of_prefixes(row):.1%}")
        figures = row["placement"]
        cells.append(f"{figures['imbalance']:.2f} ({figures['imbalance_p99']:.2f}), {figures['wait_p99_s']:.1f} s")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def share_of_prefixes(row: Json) -> float:
    """Placement's prefix hits over the oracle's."""
    share: float = row["placement"]["prefix_hits"] / row["oracle"]["prefix_hits"]
    return share


def run(options: Options, say: Callable[[str], None]) -> Json:
    """All setups, as a document."""
    document: Json = {"scenario": "placement", "options": asdict(options), "rows": [], "talks": []}
    for (adapters, pages), load in product(SETUPS, LOADS):
        row = measure(options, adapters, pages, load)
        document["rows"].append(row)
        say(f"{adapters} adapters, {pages} pages each, {load:.0%} busy: {row['share_of_oracle']:.1%}")
    for (adapters, pages), load in product(TALK_SETUPS, LOADS):
        row = measure(options, adapters, pages, load, talks)
        document["talks"].append(row)
        shares = f"{row['share_of_oracle']:.1%}, of prefixes {share_of_prefixes(row):.1%}"
        say(f"conversations, {adapters} adapters, {pages} pages each, {load:.0%} busy: {shares}")
    return document


def main(arguments: Sequence[str] | None = None) -> Json:
    """Simulate what the command line asks for, and print it."""
    parser = argparse.ArgumentParser(
        prog="python -m server.engine.bench_placement", description=(__doc__ or "").split(":")[0]
    )
    for option in fields(Options):
        parser.add_argument(f"--{option.name}", type=type(option.default), default=option.default)
    document = run(Options(**vars(parser.parse_args(arguments))), lambda text: print(text, file=sys.stderr, flush=True))
    print(markdown(document["rows"]) + "\n")
    print(talks_markdown(document["talks"]) + "\n")
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
