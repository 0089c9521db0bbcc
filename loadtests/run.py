"""Load tests: `python -m loadtests.run slora --url http://127.0.0.1:8000 --model NAME --adapters 64 --out DIR`.

Plays a workload against any server that speaks OpenAI's completions API. Into DIR go trace.jsonl, which `replay` plays
against another server, records.jsonl, report.json and report.html; the last line printed is the report as JSON.
`python -m loadtests.run compare A B` sets two such folders side by side.
"""

import argparse
import asyncio
import json
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import torch

from loadtests import workloads
from loadtests.churn import churn
from loadtests.open_loop import Target, play_trace
from loadtests.page import html_page, markdown, split_rows, summary_rows
from loadtests.process import KEY, ServerProcess
from loadtests.random_adapter import TARGETS, LinearSizes, write_adapter
from loadtests.records import read_records, write_records
from loadtests.report import FIRST_TOKEN_GOAL, compare, report
from loadtests.trace import Trace, TraceError
from loadtests.upload import upload_random

Json = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> Json:
    """Play or compare, print tables, and write the files. A trace or a report that is none is a usage error."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.workload == "compare":
        if asked.folders[0] == asked.folders[1]:
            parser.error("compare: expected two folders, got one twice")
        try:
            document = _compare(asked.folders, asked.out)
        except OSError as error:
            parser.error(str(error))
    else:
        try:
            trace = _trace(asked)
        except (TraceError, OSError) as error:
            parser.error(str(error))
        document = _run(asked, trace)
    print(json.dumps(document))
    return document


def _trace(asked: argparse.Namespace) -> Trace:
    seed = asked.seed
    if asked.workload == "slora":
        lengths = {"shortest": asked.shortest, "longest": asked.longest}
        return workloads.s_lora(
            asked.adapters, asked.rate, asked.seconds, asked.alpha, asked.variation, seed=seed, **lengths
        )
    if asked.workload == "punica":
        return workloads.punica(asked.popularity, asked.requests, asked.at_once, asked.longest, seed)
    if asked.workload == "fixed":
        return workloads.fixed(
            asked.requests,
            asked.prompt_tokens,
            asked.output_tokens,
            asked.rate,
            asked.burstiness,
            asked.adapters,
            asked.assignment,
            asked.at_once,
            seed,
        )
    if asked.workload == "llm-d":
        return workloads.llm_d(asked.rate, asked.seconds, asked.tokens, seed=seed)
    if asked.workload == "flood":
        return workloads.flood(asked.seconds, asked.rate, asked.others, asked.requests, seed=seed)
    return Trace.read(asked.trace, asked.at_once)


def _run(asked: argparse.Namespace, trace: Trace) -> Json:
    if asked.url is not None:
        return asyncio.run(_play(asked, trace, asked.url, asked.model, asked.key))
    model = Path(asked.model).resolve()
    with tempfile.TemporaryDirectory(prefix="loramux-load-") as folder:
        work = Path(folder)
        with ServerProcess(model, work / "data", *asked.serve) as server:
            sizes = LinearSizes.of(model)
            with server.client() as client:
                upload_random(client, trace.adapters, work, sizes, asked.rank, asked.targets, torch.bfloat16)
                keys = _tenants(client, trace)
            spare = write_adapter(work / "spare", sizes, asked.rank, -1, asked.targets, dtype=torch.bfloat16)
            return asyncio.run(_play(asked, trace, server.url, model.name, KEY, keys, spare))


def _tenants(client: httpx.Client, trace: Trace) -> dict[str, str]:
    """A tenant and a key for each of the trace's; `default` is there already."""
    keys = {}
    for tenant in trace.tenants:
        if tenant != "default":
            client.post("/admin/v1/tenants", json={"id": tenant}).raise_for_status()
            answer = client.post(f"/admin/v1/tenants/{tenant}/keys", json={"label": "load test"})
            keys[tenant] = answer.raise_for_status().json()["key"]
    return keys


async def _play(
    asked: argparse.Namespace,
    trace: Trace,
    url: str,
    model: str,
    key: str | None,
    keys: dict[str, str] | None = None,
    adapter: Path | None = None,
) -> Json:
    target = Target(model, key, {**dict(asked.tenant_key), **(keys or {})}, asked.vocab_size, asked.seed)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=1000)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=asked.timeout) as client:
        changes = None
        if asked.churn:
            folders = asked.churn_adapter or ([adapter] if adapter else [])
            client.headers["Authorization"] = f"Bearer {key}"
            changes = asyncio.create_task(churn(client, folders, asked.churn, asked.seed))
        records = await play_trace(client, trace, target)
        document = report(records, asked.goal)
        if changes is not None:
            changes.cancel()
            with suppress(asyncio.CancelledError):
                document["churn"] = asdict(await changes)
    document |= {"workload": asked.workload, "arguments": _plain(asked), "url": url, "model": model}
    print(markdown(summary_rows({asked.workload: document})) + "\n\n" + markdown(split_rows(document)) + "\n")
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
        trace.write(asked.out / "trace.jsonl")
        write_records(asked.out / "records.jsonl", records)
        (asked.out / "report.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        page = html_page(f"Load test: {asked.workload}", {asked.workload: (document, records)})
        (asked.out / "report.html").write_text(page, encoding="utf-8")
    return document


def _compare(folders: Sequence[Path], out: Path | None) -> Json:
    """The ratios of the first folder's run to the second's; a ratio above 1 says that the first is better."""
    runs = {str(folder): json.loads((folder / "report.json").read_text(encoding="utf-8")) for folder in folders}
    first, second = runs.values()
    ratios = compare(first, second)
    shown = [["first / second", "ratio"], *([n, "" if v is None else f"{v:.3f}"] for n, v in ratios.items())]
    print(markdown(summary_rows(runs)) + "\n\n" + markdown(shown) + "\n")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        records = {str(folder): read_records(folder / "records.jsonl") for folder in folders}
        page = html_page("Load tests compared", {name: (runs[name], records[name]) for name in runs})
        (out / "report.html").write_text(page, encoding="utf-8")
        (out / "report.json").write_text(json.dumps(ratios, indent=1) + "\n", encoding="utf-8")
    return ratios


def _plain(asked: argparse.Namespace) -> Json:
    secret = ("key", "tenant_key")
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(asked).items() if name not in secret}


def _pair(text: str) -> tuple[str, str]:
    tenant, equals, key = text.partition("=")
    if not (tenant and equals and key):
        raise argparse.ArgumentTypeError(f"{text!r}: expected TENANT=KEY")
    return tenant, key


def _targets(text: str) -> list[str]:
    targets = text.split(",")
    if not set(targets) <= set(TARGETS):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {','.join(TARGETS)}")
    return targets


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests.run", description=(__doc__ or "").split(":")[0])
    kinds = parser.add_subparsers(dest="workload", required=True, metavar="WORKLOAD")
    slora = _workload(kinds, "slora", "S-LoRA: gamma arrivals, power-law popularity, lengths U[8, 512)")
    slora.add_argument("--adapters", type=int, default=64, help="0: the base model [64]")
    slora.add_argument("--rate", type=float, default=2.0, help="requests a second [2]")
    slora.add_argument("--seconds", type=float, default=60.0, help="[60]")
    slora.add_argument("--alpha", type=float, default=1.0, help="1 is uniform, smaller is skewed [1]")
    slora.add_argument("--variation", type=float, default=1.0, help="of the gaps between arrivals [1]")
    slora.add_argument("--shortest", type=int, default=8)
    slora.add_argument("--longest", type=int, default=512)
    punica = _workload(kinds, "punica", "Punica: a closed loop, lognormal prompts")
    punica.add_argument("--popularity", choices=("distinct", "uniform", "skewed", "identical"), default="uniform")
    punica.add_argument("--requests", type=int, default=1024)
    punica.add_argument("--at-once", type=int, default=32)
    punica.add_argument("--longest", type=int, default=2048, help="tokens of prompt and output together [2048]")
    fixed = _workload(kinds, "fixed", "vLLM's bench serve: one length")
    fixed.add_argument("--requests", type=int, default=100)
    fixed.add_argument("--prompt-tokens", type=int, default=1024)
    fixed.add_argument("--output-tokens", type=int, default=128)
    fixed.add_argument("--rate", type=float, help="requests a second [all at once]")
    fixed.add_argument("--burstiness", type=float, default=1.0)
    fixed.add_argument("--adapters", type=int, default=0)
    fixed.add_argument("--assignment", choices=("random", "round-robin"), default="random")
    fixed.add_argument("--at-once", type=int)
    llm_d = _workload(kinds, "llm-d", "llm-d's mix of 15 adapters")
    llm_d.add_argument("--rate", type=float, default=20.0)
    llm_d.add_argument("--seconds", type=float, default=60.0)
    llm_d.add_argument("--tokens", type=int, default=1024, help="in and out [1024]")
    flood = _workload(kinds, "flood", "one tenant floods, others go on")
    flood.add_argument("--seconds", type=float, default=30.0)
    flood.add_argument("--rate", type=float, default=1.0, help="of each other tenant [1]")
    flood.add_argument("--others", type=int, default=3)
    flood.add_argument("--requests", type=int, default=64, help="of the flood [64]")
    replay = _workload(kinds, "replay", "a trace from a file")
    replay.add_argument("trace", type=Path)
    replay.add_argument("--at-once", type=int)
    compared = kinds.add_parser("compare", help="two runs side by side")
    compared.add_argument("folders", type=Path, nargs=2, metavar="DIR")
    compared.add_argument("--out", type=Path, metavar="DIR")
    return parser


def _workload(kinds: Any, name: str, about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=about)
    parser.add_argument("--url", help="of a running server, whose adapters are there [starts a loramux server]")
    parser.add_argument("--model", required=True, help="the base model's name there, or the folder to serve")
    parser.add_argument("--key", help="for all tenants without one of their own")
    parser.add_argument("--tenant-key", type=_pair, action="append", default=[], metavar="TENANT=KEY")
    parser.add_argument(
        "--serve", action="append", default=[], metavar="OPTION", help="for the server that is started; repeatable"
    )
    parser.add_argument("--rank", type=int, default=8, help="of the adapters that it gets [8]")
    parser.add_argument(
        "--targets", type=_targets, default=list(TARGETS), metavar="LINEARS", help="of theirs [all seven]"
    )
    parser.add_argument("--vocab-size", type=int, default=32_000, help="prompts are random ids below it [32000]")
    parser.add_argument("--goal", type=float, default=FIRST_TOKEN_GOAL, help="seconds to a first token in time [6]")
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--churn", type=float, default=0.0, help="changes of adapters a second, with the admin key [0]")
    parser.add_argument("--churn-adapter", type=Path, action="append", metavar="FOLDER", help="that it registers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="DIR")
    return parser


if __name__ == "__main__":
    main()
