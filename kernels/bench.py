"""Microbenchmarks of all operations: `python -m kernels.bench --model 8b`, one JSON line each; and `--tune`.

Every line has its whole set-up, microseconds (p20, p50, p80) of a launch within a CUDA graph over inputs that no cache
holds, GB/s, and the share of the floor: the time that a copy of as many bytes takes on the same device. Before it is
timed, each result is compared with a reference in fp32. The last line is one JSON document of all of them.

`--tune` measures candidates of the base products and writes kernels/tables/<GPU>.json. `--device cpu` only shows that
everything runs, under Triton's interpreter (TRITON_INTERPRET=1), and with tiny shapes.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kernels import bench_cases, bench_einsum, bench_lora, bench_meteora
from kernels.bench_cases import Case, Where
from kernels.bench_timing import Timing, copy_bandwidth, error, measure, measure_eagerly, own_stream
from kernels.gemm_table import TABLES, GemmTable
from kernels.shapes import SHAPES
from kernels.tiles import PAGE_RANK
from kernels.tune import Tuning, table_of, tune

Json = dict[str, Any]

OPS = ("gemm", "lora", "linears", "einsum", "meteora", "attention", "elementwise")
ROWS = (1, 8, 16, 32, 64, 128)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 0 done, 1 a result was wrong."""
    asked = _parser().parse_args(arguments)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(found if asked.device == "auto" else asked.device)
    if device.type == "cpu" and asked.model != "tiny":
        raise SystemExit("a CPU can only show that --model tiny runs")
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    where = Where(device, dtype, asked.seed, hopper and not asked.no_pdl)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    with own_stream(device):
        return _tune(asked, where, name) if asked.tune else _measure(asked, where, name)


def _measure(asked: argparse.Namespace, where: Where, name: str) -> int:
    floor = copy_bandwidth(where.device)
    rows = []
    for case in cases(asked, where, name):
        rows.append(result(case, where, floor))
        print(json.dumps(rows[-1]), flush=True)
    document = _document(asked, name, floor, rows)
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(document) + "\n", encoding="utf-8")
    wrong = [row for row in rows if row["us_p50"] is None]
    for row in wrong:
        why = row["failed"] or f"error {row['error']}"
        say(f"{row['op']} {row['case']} {row['backend']}, {row['rows']} rows: {why}")
    print(json.dumps(document))
    return 1 if wrong else 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cases(asked: argparse.Namespace, where: Where, name: str) -> Iterator[Case]:
    """The cases of the operations that were asked for; inputs exist only while their case is at hand."""
    shape, rows, rank = SHAPES[asked.model], asked.rows or ROWS, asked.rank or PAGE_RANK
    for op in asked.ops:
        if op == "gemm":
            yield from bench_cases.gemm_cases(shape, rows, where, name)
        elif op == "lora":
            yield from bench_lora.lora_cases(shape, rows, asked.popularity, where, rank)
        elif op == "linears":
            yield from bench_lora.chain_cases(shape, rows, asked.popularity, where, rank)
        elif op == "einsum":
            yield from bench_einsum.einsum_cases(shape, rows, where, rank, asked.tokens)
        elif op == "meteora":
            yield from bench_meteora.gated_cases(shape, _settings(asked), where)
        elif op == "attention":
            yield from bench_cases.attention_cases(shape, rows, asked.context, where)
        else:
            yield from bench_cases.elementwise_cases(shape, rows, where)


def _settings(asked: argparse.Namespace) -> list[bench_meteora.Setting]:
    rows, rank = asked.rows or bench_meteora.ROWS, asked.rank or bench_meteora.RANK
    return bench_meteora.settings_of(rows, asked.adapters, asked.top_k, asked.routing, rank)


def result(case: Case, where: Where, floor: float) -> Json:
    """One line: the case, its error, and its times unless the error is too large or the case failed."""
    found, timing, eager, failed = float("nan"), None, None, None
    try:
        out = case.run(0)
        found = error(out if isinstance(out, torch.Tensor) else torch.cat(list(out), dim=-1), case.expected())
        if found <= TOLERANCE[where.dtype]:
            eager = measure_eagerly(case.run, case.copies, where.device) if case.eager else None
            timing = measure(case.run, case.copies, where.device) if case.captured else eager
    except Exception as problem:  # one case that cannot run must not cost the others; the exit code tells
        failed = f"{type(problem).__name__}: {problem}".split("\n")[0][:300]
    line = {
        "op": case.op,
        "case": case.case,
        "rows": case.rows,
        "backend": case.backend,
        "dtype": str(where.dtype).removeprefix("torch."),
        "bytes": case.num_bytes,
        "copies": case.copies,
        **case.setup,
        "error": found if math.isfinite(found) else None,
        "failed": failed,
    }
    if case.eager:
        line |= {"captured": case.captured, "eager_us_p50": eager and eager.p50}
    return {**line, **_figures(case, timing, floor)}


def _figures(case: Case, timing: Timing | None, floor: float) -> Json:
    """Times, rates and the share of the floor; None for what was not measured."""
    names = ("us_p20", "us_p50", "us_p80", "gb_per_second", "tflops", "floor_us", "floor_share")
    figures: Json = dict.fromkeys(names)
    if not math.isnan(floor):
        figures["floor_us"] = case.num_bytes / floor * 1e6
    if timing is not None:
        seconds = timing.p50 * 1e-6
        figures |= {"us_p20": timing.p20, "us_p50": timing.p50, "us_p80": timing.p80}
        figures["gb_per_second"] = case.num_bytes / seconds / 1e9
        figures["tflops"] = case.flops / seconds / 1e12 if case.flops else None
        figures["floor_share"] = None if math.isnan(floor) else case.num_bytes / floor / seconds
    return figures


def _document(asked: argparse.Namespace, name: str, floor: float, rows: list[Json]) -> Json:
    return {
        "bench": "kernels",
        "model": asked.model,
        "device": name,
        "seed": asked.seed,
        "versions": {package: version(package) for package in ("torch", "triton")},
        "commit": asked.commit,
        "copy_gb_per_second": None if math.isnan(floor) else floor / 1e9,
        "arguments": {key: value.name if isinstance(value, Path) else value for key, value in vars(asked).items()},
        "rows": rows,
        "einsum": bench_einsum.compared(rows),
        "meteora": bench_meteora.compared(rows),
    }


def _tune(asked: argparse.Namespace, where: Where, name: str) -> int:
    tuning = Tuning(asked.candidates, asked.tolerance, asked.time_limit)
    results = list(tune(SHAPES[asked.model], where, tuning, say))
    path = table_of(results, GemmTable.load(name)).save(name, asked.tables)
    ours = sum(bool(tuned.choice and tuned.choice.alone) for tuned in results)
    say(f"{path}: {ours} of {len(results)} products are ours")
    lines = [
        {"n": t.key[0], "k": t.key[1], "rows_class": t.key[2], "us": t.triton, "cublas_us": t.cublas} for t in results
    ]
    print(json.dumps({"tuned": lines, "device": name, "table": str(path)}))
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _ops(text: str) -> tuple[str, ...]:
    if unknown := set(text.split(",")) - set(OPS):
        raise argparse.ArgumentTypeError(f"{sorted(unknown)[0]!r} is none of {', '.join(OPS)}")
    return _words(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--ops", type=_ops, default=OPS, help=f"some of {','.join(OPS)}")
    parser.add_argument("--rows", type=_numbers, help="default: as many as the operation is used with")
    parser.add_argument("--popularity", type=_words, default=("1", "8", "64", "mix3"), help="K, zipf, mixK")
    parser.add_argument("--rank", type=int, choices=range(1, 17), metavar="1..16", help="default 16, in meteora 8")
    parser.add_argument("--context", type=int, default=400, help="tokens of each decoding sequence")
    parser.add_argument("--tokens", type=int, default=1, help="of each row in einsum [1: decoding]")
    parser.add_argument("--adapters", type=_numbers, default=(8, 28, 48), help="behind each gate in meteora")
    parser.add_argument("--top-k", type=_numbers, default=(1, 2), help="of them that a token uses")
    parser.add_argument("--routing", type=_words, default=bench_meteora.ROUTINGS, help="uniform, single")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-pdl", action="store_true", help="without programmatic dependent launch")
    parser.add_argument("--commit", help="stored with the results")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--tune", action="store_true", help="measure candidates of the base products, write the table")
    parser.add_argument("--tables", type=Path, default=TABLES, help="folder that --tune writes to")
    parser.add_argument("--candidates", type=int, default=16, help="of each product")
    parser.add_argument("--tolerance", type=float, default=0.01, help="how much slower than cuBLAS ours may be")
    parser.add_argument("--time-limit", type=float, default=110.0, help="seconds of --tune")
    return parser


if __name__ == "__main__":
    sys.exit(main())
