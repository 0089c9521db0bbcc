"""The engine's own benchmark: `python -m server.engine.bench --model 8b --out result.json`.

A random model of a known shape, random adapters, no files and no network. Progress goes to stderr; the last line of
stdout is one JSON document with all figures and the whole set-up.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from adapters_store.types import TARGETS
from kernels.shapes import SHAPES
from server.engine import peers
from server.engine.bench_arrivals import latency, many_adapters
from server.engine.bench_gated import gated
from server.engine.bench_grammar import grammar
from server.engine.bench_loads import loads
from server.engine.bench_scenarios import Json, memory, steady_decode, throughput
from server.engine.bench_session import Options, Session
from server.engine.results import tables
from server.engine.workload import Traffic

SCENARIOS: Mapping[str, Callable[[Session], Json]] = MappingProxyType(
    {
        "throughput": throughput,
        "decode": steady_decode,
        "latency": latency,
        "many_adapters": many_adapters,
        "loads": loads,
        "gated": gated,
        "grammar": grammar,
        "memory": memory,
    }
)
QUICK: Mapping[str, Any] = MappingProxyType({"requests": 64, "repeats": 1, "steps": 50, "seconds": 5.0, "profiled": 10})


def main(arguments: Sequence[str] | None = None) -> Json:
    """Measure what the command line asks for, print it, and write it to `--out`."""
    asked = _parser().parse_args(arguments)
    options = _options(asked)
    names = asked.scenario.split(",")
    if unknown := [name for name in names if name not in SCENARIOS]:
        raise SystemExit(f"--scenario has {unknown[0]!r}, expected some of {', '.join(SCENARIOS)}")
    document = run(options, names, lambda text: print(text, file=sys.stderr, flush=True), asked.commit)
    line = json.dumps(document)
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for table in tables(document):
        print(table, end="\n\n")
    print(line)
    return document


def run(options: Options, names: Sequence[str], say: Callable[[str], None], source: str | None = None) -> Json:
    """The document of some scenarios over one model. `source` is the commit where there is no repository to ask."""
    scenarios: dict[str, Json] = {}
    with Session(options, say) as session:
        for name in names:
            started = time.perf_counter()
            scenarios[name] = {**SCENARIOS[name](session), "wall_seconds": time.perf_counter() - started}
            say(f"{name}: {scenarios[name]['wall_seconds']:.0f} s in all")
        device = session.device_name
        capability = torch.cuda.get_device_capability(session.device) if session.cuda else None
        return {
            "bench": "engine",
            "model": options.model,
            "device": device,
            "capability": capability,
            "dtype": str(session.dtype).removeprefix("torch."),
            "seed": options.seed,
            "versions": {name: _version(name) for name in ("torch", "triton", "transformers")},
            "cuda": torch.version.cuda if session.cuda else None,
            "commit": source or commit(),
            "arguments": asdict(options),
            "shape": asdict(session.shape),
            "peers": {name: dict(figures) for name, figures in peers.TOKENS_PER_SECOND.items()},
            "ratio": "ours / best peer" if peers.GPU in device else peers.NO_RATIO,
            "scenarios": scenarios,
        }


def commit() -> str | None:
    """The commit of this source, `+changes` where files differ from it, None outside a repository."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _options(asked: argparse.Namespace) -> Options:
    known = {field.name for field in fields(Options)}
    given = {name: value for name, value in vars(asked).items() if name in known and value is not None}
    quick = {name: value for name, value in QUICK.items() if name not in given} if asked.quick else {}
    return replace(Options(), **quick, **given)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _labels(text: str) -> tuple[str, ...]:
    for part in text.split(","):
        Traffic.parse(part)
    return tuple(text.split(","))


def _gated(text: str) -> str:
    if not Traffic.parse(text).top_k:
        raise argparse.ArgumentTypeError(f"{text!r} is not like top2of28")
    return text


def _targets(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in TARGETS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(TARGETS)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m server.engine.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=tuple(SHAPES))
    parser.add_argument("--scenario", default="throughput,decode", help=f"some of {','.join(SCENARIOS)}")
    parser.add_argument(
        "--adapters", dest="traffic", type=_labels, help="kinds of traffic: off, 0, 8, mix3 (of 64), mix2of28"
    )
    parser.add_argument("--gated", type=_gated, help="adapters behind the gates in gated, and how many a token uses")
    parser.add_argument("--rows", type=_numbers, help="sequences of a decode step [1,8,64]")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--backend", help="of the kernels [auto]")
    parser.add_argument("--cuda-graphs", help="capture, lazy or eager [capture]")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--shortest", type=int, help="tokens of a prompt or output, at least [8]")
    parser.add_argument("--longest", type=int, help="tokens of a prompt or output, at most [512]")
    parser.add_argument("--concurrency", type=int)
    parser.add_argument("--context", type=int, help="tokens of context of a decode step [400]")
    parser.add_argument("--steps", type=int, help="decode steps that are timed [64]")
    parser.add_argument("--profiled", type=int, help="further decode steps under the profiler; 0: none [20]")
    parser.add_argument("--seconds", type=float, help="how long requests arrive in latency [15]")
    parser.add_argument("--rank", type=int)
    parser.add_argument(
        "--targets", type=_targets, help="linears of the adapters in throughput, decode and latency [all]"
    )
    parser.add_argument("--many", type=int, help="adapters of many_adapters [1000]")
    parser.add_argument("--device-adapters", type=int, help="adapters whose pages fit the device in many_adapters")
    parser.add_argument("--max-batch-tokens", type=int)
    parser.add_argument("--quick", action="store_true", help="fewer requests and repeats")
    parser.add_argument("--commit", help="stored with the results; asked of git where there is a repository")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser


if __name__ == "__main__":
    main()
