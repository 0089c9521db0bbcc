"""Several engines against one, behind one address: `python -m loadtests.engines --model FOLDER --out DIR`.

Punica's closed loop, the same trace in each run, against servers of our own that differ in `--engines` alone. The cores
of the machine are shared out between a server's engines, and the client runs beside them. Repeats take turns, so that a
machine that becomes slower does so for all. Prints Markdown, and one JSON document as the last line.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from loadtests import workloads
from loadtests.open_loop import Target, play_trace
from loadtests.page import markdown
from loadtests.process import KEY, ServerProcess
from loadtests.random_adapter import LinearSizes
from loadtests.report import report
from loadtests.trace import Trace
from loadtests.upload import upload_random

Json = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> Json:
    """Measure what the command line asks for, and print it."""
    asked = _parser().parse_args(arguments)
    trace = workloads.punica(asked.popularity, asked.requests, asked.at_once, asked.longest, asked.seed)
    runs: dict[int, list[Json]] = {engines: [] for engines in asked.engines}
    for _ in range(asked.repeats):
        for engines, done in runs.items():
            done.append(_run(asked, trace, engines))
    document = summary(runs) | {"cores": os.cpu_count(), "adapters": len(trace.adapters), "arguments": _plain(asked)}
    print(markdown(rows(document)) + "\n")
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "engines.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))
    return document


def summary(runs: dict[int, list[Json]]) -> Json:
    """By number of engines the median throughput and the median of first tokens; ratios are to the first number."""
    figures = []
    for engines, done in runs.items():
        rates = [each["tokens_per_second"] for each in done]
        figures.append(
            {
                "engines": engines,
                "tokens_per_second": statistics.median(rates),
                "spread": (max(rates) - min(rates)) / statistics.median(rates),
                "ttft_p50_ms": statistics.median(each["all"]["ttft"]["p50"] for each in done),
                "itl_p50_ms": statistics.median(each["all"]["itl"]["p50"] for each in done),
                "failed": sum(each["requests"] - each["statuses"].get("ok", 0) for each in done),
            }
        )
    for each in figures:
        each["ratio"] = each["tokens_per_second"] / figures[0]["tokens_per_second"]
    return {"scenario": "engines", "runs": figures}


def rows(document: Json) -> list[list[str]]:
    """A table, with its head."""
    head = ["engines", "output tokens/s", "spread", "ratio", "first token ms, median", "between tokens ms, median"]
    return [
        head,
        *(
            [
                str(run["engines"]),
                f"{run['tokens_per_second']:,.1f}",
                f"{run['spread']:.1%}",
                f"{run['ratio']:.2f}",
                f"{run['ttft_p50_ms']:,.0f}",
                f"{run['itl_p50_ms']:,.0f}",
            ]
            for run in document["runs"]
        ),
    ]


def _run(asked: argparse.Namespace, trace: Trace, engines: int) -> Json:
    model = Path(asked.model).resolve()
    options = ["--engines", str(engines), "--encoder", "none", *asked.serve]
    with tempfile.TemporaryDirectory(prefix="loramux-engines-") as folder:
        work = Path(folder)
        with ServerProcess(model, work / "data", *options) as server:
            sizes = LinearSizes.of(model)
            with server.client() as client:
                upload_random(client, trace.adapters, work, sizes, asked.rank)
            return asyncio.run(_play(asked, trace, server.url, model.name))


async def _play(asked: argparse.Namespace, trace: Trace, url: str, model: str) -> Json:
    target = Target(model, KEY, vocab_size=asked.vocab_size, seed=asked.seed)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=1000)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=asked.timeout) as client:
        return report(await play_trace(client, trace, target))


def _plain(asked: argparse.Namespace) -> Json:
    """The model by its name: where it lies is nobody's concern."""
    return vars(asked) | {"model": Path(asked.model).name, "out": None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests.engines", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--model", required=True, help="the folder to serve")
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers to compare [1 2]")
    parser.add_argument("--popularity", choices=("distinct", "uniform", "skewed", "identical"), default="uniform")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--longest", type=int, default=256, help="tokens of prompt and output together [256]")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters, random ones [8]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--serve", action="append", default=[], metavar="OPTION", help="for every server; repeatable")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="prompts are random ids below it [32000]")
    parser.add_argument("--timeout", type=float, default=1800.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="DIR")
    return parser


if __name__ == "__main__":
    main()
