"""How an engine is shared while one tenant floods it: `python -m server.engine.bench_fairness [--model FOLDER]`.

One tenant sends all its long requests at once; `delay` steps later the other one comes, with `rows` clients that send a
request for every answer until the flood has been served. Prints one JSON document. Its runs: `flood`; `uncached`, the
same without a prefix cache; `one_tenant`, the same requests as those of one tenant, in order of arrival, so that nobody
yields; `alone`, those of the other tenant without the flood. Tokens are priced as the counters price them.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters_store.pages import page_bytes
from adapters_store.types import GROUPS
from kernels.shapes import SHAPES
from server.engine.bench_measure import BenchError, percentile
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.fairness import INPUT_PRICE, OUTPUT_PRICE
from server.engine.sequence import Output, Request, SamplingParams
from server.engine.workload import write_config
from server.model.config import ModelConfig

Json = dict[str, Any]
Clock = Callable[[], float]

FLOOD, OTHER = "flood", "other"
INTERVALS = 10
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Options:
    """Sizes of the contest: `flood` requests of `flood_tokens`, the other's of `other_tokens`, after `prompt` tokens.

    `model`: a folder; none: a tiny random model. `weight` is that of the other tenant, beside 1.
    """

    model: str | None = None
    device: str = "auto"
    rows: int = 16
    flood: int = 64
    flood_tokens: int = 96
    other_tokens: int = 32
    prompt: int = 32
    delay: int = 8
    weight: float = 1.0
    seed: int = 0


@dataclass
class Run:
    """What one engine did. `served` are (seconds, tenant, priced tokens); times begin with the first step."""

    served: list[tuple[float, str, float]] = field(default_factory=list)
    arrived: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    texts: dict[str, list[int]] = field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0
    token_rows: int = 0
    preemptions: int = 0
    yielded: int = 0

    def share(self, start: float, stop: float) -> float | None:
        """The other tenant's share of what was served after `start`, until `stop`."""
        within = [(tenant, tokens) for at, tenant, tokens in self.served if start < at <= stop]
        total = sum(tokens for _, tokens in within)
        return sum(tokens for tenant, tokens in within if tenant == OTHER) / total if total else None


class Contest:
    """Drives an engine through one run. Request i of a tenant is the same in every run."""

    def __init__(self, engine: Engine, options: Options, clock: Clock) -> None:
        self.engine = engine
        self.options = options
        self.clock = clock
        self.run = Run()
        self.start = clock()

    def add(self, tenant: str, number: int, payer: str | None = None) -> None:
        """`payer`: the tenant that the engine is told."""
        options, name = self.options, f"{tenant}-{number}"
        random = np.random.default_rng([options.seed, tenant == FLOOD, number])
        prompt = random.integers(self.engine.runner.model.vocab_size, size=options.prompt).tolist()
        length = options.flood_tokens if tenant == FLOOD else options.other_tokens
        params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
        weight = options.weight if (payer or tenant) == OTHER else 1.0
        self.run.arrived[name] = self.clock() - self.start
        self.run.texts[name] = []
        self.engine.add_request(Request(name, tuple(prompt), params, tenant=payer or tenant, weight=weight))

    def step(self) -> list[str]:
        """The names of the requests that ended."""
        outputs = self.engine.step()
        now = self.clock() - self.start
        for output in outputs:
            self._count(output, now)
        return [output.request_id for output in outputs if output.finish_reason is not None]

    def drain(self) -> Run:
        while self.engine.has_work:
            self.step()
        run, stats = self.run, self.engine.stats()
        run.seconds = self.clock() - self.start
        run.steps = len(stats.steps)
        run.token_rows = sum(rows for _, rows in stats.steps)
        run.preemptions, run.yielded = stats.preemptions, self.engine.scheduler.yielded
        return run

    def _count(self, output: Output, now: float) -> None:
        if output.error is not None:
            raise BenchError(f"{output.request_id} failed: {output.error}")
        name = output.request_id
        tokens = OUTPUT_PRICE * len(output.tokens)
        if name not in self.run.first:
            self.run.first[name] = now
            tokens += INPUT_PRICE * self.options.prompt
        self.run.texts[name] += output.tokens
        self.run.served.append((now, name.partition("-")[0], tokens))


def flooded(contest: Contest) -> Run:
    """The other tenant sends for as long as the flood is being served."""
    options, left = contest.options, contest.options.flood
    for number in range(options.flood):
        contest.add(FLOOD, number)
    for _ in range(options.delay):
        contest.step()
    sent = options.rows
    for number in range(options.rows):
        contest.add(OTHER, number)
    while left:
        ended = contest.step()
        left -= sum(name.startswith(FLOOD) for name in ended)
        for name in ended:
            if left and name.startswith(OTHER):
                contest.add(OTHER, sent)
                sent += 1
    return contest.drain()


def alone(contest: Contest, requests: int) -> Run:
    """The other tenant's requests without the flood, from as many clients."""
    sent = min(requests, contest.options.rows)
    for number in range(sent):
        contest.add(OTHER, number)
    while sent < requests:
        for _ in contest.step()[: requests - sent]:
            contest.add(OTHER, sent)
            sent += 1
    return contest.drain()


def as_one(contest: Contest, requests: int) -> Run:
    """All requests at once, of one tenant."""
    for tenant, count in ((FLOOD, contest.options.flood), (OTHER, requests)):
        for number in range(count):
            contest.add(tenant, number, payer=FLOOD)
    return contest.drain()


def run(options: Options, say: Callable[[str], None], clock: Clock = time.perf_counter) -> Json:
    """The document of all runs. Raises BenchError where a request fails."""
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            write_config(SHAPES["tiny"], Path(folder))

        def measured(name: str, drive: Callable[[Contest], Run], prefix_cache: bool = True) -> Run:
            with closing(_engine(options, options.model or folder, prefix_cache)) as engine:
                warm_up(engine)
                done = drive(Contest(engine, options, clock))
                engine.check_integrity()
            say(f"{name}: {done.seconds:.1f} s, {done.yielded} of {len(done.texts)} requests yielded")
            return done

        flood = measured("flood", flooded)
        others = sum(name.startswith(OTHER) for name in flood.texts)
        runs = {
            "flood": flood,
            "uncached": measured("uncached", flooded, prefix_cache=False),
            "one_tenant": measured("one_tenant", lambda contest: as_one(contest, others)),
            "alone": measured("alone", lambda contest: alone(contest, others)),
        }
    return {
        "bench": "fairness",
        "arguments": asdict(options),
        "due": options.weight / (options.weight + 1.0),
        **_shares(flood),
        "same_texts": sum(flood.texts[name] == runs["one_tenant"].texts[name] for name in flood.texts),
        "runs": {name: _figures(options, done) for name, done in runs.items()},
    }


def warm_up(engine: Engine) -> None:
    engine.add_request(Request("warm-up", (0,), SamplingParams(max_tokens=8, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    engine.stats()  # forgets the steps


def _engine(options: Options, folder: str, prefix_cache: bool) -> Engine:
    """Memory for the context of every request that can be under way, so that only rows are short, and no adapters."""
    model = ModelConfig.from_folder(folder)
    longest = options.prompt + max(options.flood_tokens, options.other_tokens)
    longest = -(-longest // BLOCK_SIZE) * BLOCK_SIZE
    contexts = options.flood + 2 * options.rows
    largest = torch.float32.itemsize
    config = EngineConfig(
        folder,
        device=options.device,
        max_num_seqs=options.rows,
        max_batch_tokens=max(EngineConfig.max_batch_tokens, options.rows),
        max_model_len=longest,
        kv_memory=contexts * longest * 2 * model.num_layers * model.num_kv_heads * model.head_dim * largest,
        page_memory=sum(page_bytes(model.linear_shape, group, largest) for group in GROUPS),
        block_size=BLOCK_SIZE,
        prefix_cache=prefix_cache,
        load_format="safetensors" if options.model else "random",
        seed=options.seed,
    )
    return Engine.from_config(config)


def _shares(flood: Run) -> Json:
    """The other tenant's share from its arrival until the flood has been served, and by interval.

    At the end of the flood fewer of its requests are left than it has rows, so that the other one's share rises.
    """
    start = flood.arrived[f"{OTHER}-0"]
    stop = max(at for at, tenant, _ in flood.served if tenant == FLOOD)
    marks = np.linspace(start, stop, INTERVALS + 1).tolist()
    return {
        "share": flood.share(start, stop),
        "seconds": stop - start,
        "intervals": [flood.share(before, after) for before, after in pairwise(marks)],
    }


def _figures(options: Options, done: Run) -> Json:
    """Token rows beyond those of prompts and outputs (the last token of each is not computed) are recomputed ones."""
    outputs = sum(len(text) for text in done.texts.values())
    once = sum(options.prompt + len(text) - 1 for text in done.texts.values())
    waits = {
        tenant: [done.first[name] - at for name, at in done.arrived.items() if name.startswith(tenant)]
        for tenant in (FLOOD, OTHER)
    }
    return {
        "requests": len(done.texts),
        "seconds": done.seconds,
        "steps": done.steps,
        "output_tokens_per_second": outputs / done.seconds,
        "preemptions": done.preemptions,
        "yielded": done.yielded,
        "recomputed": done.token_rows - once,
        "recomputed_share": done.token_rows / once - 1.0,
        "first_token": {
            tenant: {"p50": percentile(times, 50), "max": max(times)} for tenant, times in waits.items() if times
        },
    }


def main(arguments: Sequence[str] | None = None) -> Json:
    """Measure what the command line asks for, and print it."""
    parser = argparse.ArgumentParser(
        prog="python -m server.engine.bench_fairness", description=(__doc__ or "").split("\n")[0]
    )
    for option in fields(Options):
        kind = str if option.name in ("model", "device") else float if option.name == "weight" else int
        parser.add_argument(f"--{option.name.replace('_', '-')}", type=kind, default=option.default)
    options = Options(**vars(parser.parse_args(arguments)))
    document = run(options, lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
