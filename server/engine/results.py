"""Stored benchmark results: the tables of docs/results.md, and the gate against becoming slower.

`python -m server.engine.results docs/results/*.json` writes the tables of all files between the two markers of
docs/results.md; `--compare STORED NEW` prints every figure of NEW that is at least 5 % worse and exits with 1.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters_store.types import TARGETS

Json = dict[str, Any]

BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
TOLERANCE = 0.05

Cell = Callable[[Any], str]


def _plain(value: Any) -> str:
    return str(value)


def _count(value: Any) -> str:
    return f"{value:,.0f}"


def _one(value: Any) -> str:
    return f"{value:,.1f}"


def _two(value: Any) -> str:
    return f"{value:.2f}"


def _three(value: Any) -> str:
    return f"{value:.3f}"


def _percent(value: Any) -> str:
    return f"{100 * value:.1f} %"


def _gigabytes(value: Any) -> str:
    return f"{value / 1e9:.3f}"


@dataclass(frozen=True)
class Column:
    """A column of a table: title, the key of its value in a row, and how that is printed."""

    title: str
    key: str
    cell: Cell = _plain


COLUMNS: Mapping[str, tuple[Column, ...]] = {
    "throughput": (
        Column("adapters", "traffic"),
        Column("output tokens/s", "tokens_per_second", _count),
        Column("spread", "spread", _percent),
        Column("loss", "loss", _percent),
        Column("ratio to the best peer", "ratio", _two),
        Column("steps", "steps", _count),
    ),
    "decode": (
        Column("rows", "rows"),
        Column("adapters", "traffic"),
        Column("ms a step", "ms", _three),
        Column("p10", "ms_p10", _three),
        Column("p90", "ms_p90", _three),
        Column("loss", "loss", _percent),
        Column("steps/s", "steps_per_second", _one),
        Column("host ms", "host_ms", _three),
        Column("host share", "host_share", _percent),
        Column("GPU busy", "gpu_busy", _percent),
    ),
    "latency": (
        Column("adapters", "traffic"),
        Column("load", "load", _percent),
        Column("requests/s", "requests_per_second", _two),
        Column("first token p50 ms", "ttft_p50_ms", _one),
        Column("p99", "ttft_p99_ms", _one),
        Column("between tokens p50 ms", "gap_p50_ms", _two),
        Column("p99", "gap_p99_ms", _two),
    ),
    "many_adapters": (
        Column("popularity", "traffic"),
        Column("load", "load", _percent),
        Column("adapters used", "adapters", _count),
        Column("requests", "requests", _count),
        Column("output tokens/s", "tokens_per_second", _count),
        Column("loss", "loss", _percent),
        Column("loads", "loads", _count),
        Column("evictions", "evictions", _count),
        Column("first token p50 ms", "ttft_p50_ms", _one),
        Column("p99", "ttft_p99_ms", _one),
        Column("warm requests", "warm", _count),
        Column("p99 of warm ones", "ttft_warm_p99_ms", _one),
    ),
    "loads": (
        Column("adapters/s asked", "rate", _count),
        Column("loaded", "loads_per_second", _one),
        Column("ms a step", "ms", _three),
        Column("p90", "ms_p90", _three),
        Column("p99", "ms_p99", _three),
        Column("slower", "slower", _percent),
    ),
    "gated": (
        Column("", "what"),
        Column("rows", "rows"),
        Column("adapters", "traffic"),
        Column("ms a step", "ms", _three),
        Column("p10", "ms_p10", _three),
        Column("p90", "ms_p90", _three),
        Column("output tokens/s", "tokens_per_second", _count),
        Column("loss", "loss", _percent),
        Column("GPU busy", "gpu_busy", _percent),
    ),
    "grammar": (
        Column("rows", "rows"),
        Column("grammar", "traffic"),
        Column("ms a token of each", "ms", _three),
        Column("p10", "ms_p10", _three),
        Column("p90", "ms_p90", _three),
        Column("loss", "loss", _percent),
        Column("late rows", "late", _percent),
        Column("us a mask", "mask_us", _one),
        Column("mean", "mask_us_mean", _one),
    ),
    "memory": (
        Column("kind", "kind"),
        Column("planned GB", "planned", _gigabytes),
        Column("reported GB", "reported", _gigabytes),
    ),
    "kernels": (
        Column("op", "op"),
        Column("case", "case"),
        Column("rows", "rows"),
        Column("backend", "backend"),
        Column("us", "us_p50", _one),
        Column("p20", "us_p20", _one),
        Column("p80", "us_p80", _one),
        Column("GB/s", "gb_per_second", _count),
        Column("share of the floor", "floor_share", _percent),
        Column("error", "error", lambda value: f"{value:.1e}"),
    ),
}

TITLES: Mapping[str, str] = {
    "throughput": "Throughput, all requests at once",
    "decode": "Steady decoding",
    "latency": "Latency under Poisson arrivals",
    "many_adapters": "Many adapters, S-LoRA's synthetic workload",
    "loads": "Steady decoding while adapters come from host memory",
    "gated": "Token-level routing beside the base model",
    "grammar": "Constrained decoding beside free decoding",
    "memory": "Memory",
}

OWN_ADAPTERS = frozenset({"gated", "grammar", "many_adapters"})
"""Tables whose adapters are not the arguments': they have none, or tell which."""

FIGURES: Mapping[str, tuple[tuple[str, ...], Mapping[str, bool]]] = {
    "throughput": (("traffic",), {"tokens_per_second": True}),
    "decode": (("rows", "traffic"), {"ms": False}),
    "latency": (("traffic", "load"), {"ttft_p50_ms": False, "gap_p50_ms": False}),
    "many_adapters": (("traffic", "load"), {"tokens_per_second": True}),
    "loads": (("rate",), {"ms": False}),
    "grammar": (("rows", "traffic"), {"ms": False}),
    "gated": (("what", "rows", "traffic"), {"ms": False, "tokens_per_second": True}),
    "kernels": (("op", "case", "rows", "backend"), {"us_p50": False}),
}
"""By table: the keys that name a row, and its figures that the gate watches; True where higher is better."""


def tables(document: Json) -> list[str]:
    """Markdown of every table of a document, each with its title; values that are None are left blank."""
    if document["bench"] == "kernels":
        return [markdown("kernels", document["rows"])]
    parts = []
    for name, scenario in document["scenarios"].items():
        parts.append(f"{TITLES[name]}{_remarks(name, scenario)}:\n\n{markdown(name, scenario['rows'])}")
    return parts


def markdown(name: str, rows: Sequence[Json]) -> str:
    """One table; columns without a single value are left out."""
    columns = [column for column in COLUMNS[name] if any(row.get(column.key) is not None for row in rows)]
    lines = [[column.title for column in columns], ["---"] * len(columns)]
    for row in rows:
        values = [row.get(column.key) for column in columns]
        lines.append(["" if v is None else column.cell(v) for column, v in zip(columns, values, strict=True)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _remarks(name: str, scenario: Json) -> str:
    if name == "throughput" and scenario["rows"]:
        row = scenario["rows"][0]
        return (
            f" ({row['requests']} requests, {row['prompt_tokens']:,} prompt and {row['output_tokens']:,} output tokens,"
            f" {scenario['concurrency']} at a time)"
        )
    if name == "decode":
        return f" ({scenario['context']} tokens of context, {scenario['steps']} steps)"
    if name == "gated":
        return f" (adapters of rank {scenario['rank']}, {scenario['context']} tokens of context)"
    if name == "many_adapters":
        pages = max(scenario["pages"].values())
        return (
            f" ({scenario['host']:,} adapters of rank {scenario['rank']} on q_proj and v_proj in host memory,"
            f" {pages} pages on the device)"
        )
    if name == "memory" and scenario["error"] is not None:
        taken = scenario["served"]["device"]
        whole = f"{_gigabytes(scenario['planned'])} GB planned with the weights, {_gigabytes(taken)} GB taken"
        return f" ({whole}, {_percent(scenario['error'])} off)"
    return ""


def render(text: str, documents: Iterable[Json]) -> str:
    """`text` with the tables of `documents` between its markers. Raises ValueError where it lacks them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the markers {BEGIN} and {END}, in this order")
    parts = [part for document in documents for part in (_heading(document), *tables(document))]
    return before + begin + "\n\n" + "\n\n".join(parts) + "\n\n" + end + after


def _heading(document: Json) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items() if value)
    commit = (document["commit"] or "unknown")[:8] + ("+changes" if "+" in (document["commit"] or "") else "")
    what = f"{document['bench'].capitalize()}, {document['model']} shape"
    lines = [f"### {what}, {document['device']}", "", f"Commit {commit}, seed {document['seed']}, {versions}."]
    arguments = document.get("arguments", {})
    if (targets := arguments.get("targets")) and not OWN_ADAPTERS.issuperset(document.get("scenarios", {})):
        linears = "all linears" if len(targets) == len(TARGETS) else ", ".join(targets)
        lines[-1] += f" Adapters of rank {arguments['rank']} on {linears}."
    if isinstance(document.get("ratio"), str) and document["ratio"].startswith("no ratio"):
        lines[-1] += f" {document['ratio'][0].upper()}{document['ratio'][1:]}."
    if document.get("copy_gb_per_second"):
        lines[-1] += f" Copies reach {document['copy_gb_per_second']:,.0f} GB/s, the floor of every row."
    return "\n".join(lines)


def figures(document: Json) -> dict[str, tuple[float, bool]]:
    """Name to (value, whether higher is better) of all that the gate watches."""
    kernels = document["bench"] == "kernels"
    parts = {"kernels": document} if kernels else document["scenarios"]
    found: dict[str, tuple[float, bool]] = {}
    for name, part in parts.items():
        keys, watched = FIGURES.get(name, ((), {}))
        for row in part["rows"]:
            where = " ".join(f"{key} {row[key]}" for key in keys if key in row)
            found |= {
                f"{name}: {where}: {figure}": (float(row[figure]), higher)
                for figure, higher in watched.items()
                if row.get(figure) is not None
            }
    return found


def compare(stored: Json, new: Json, tolerance: float = TOLERANCE) -> list[str]:
    """A line for every figure in both that is worse by `tolerance` or more.

    Raises ValueError where they are of different benchmarks, models or GPUs, or share no figure.
    """
    for key in ("bench", "model", "device"):
        if stored[key] != new[key]:
            raise ValueError(f"{key} is {new[key]!r}, but the stored result has {stored[key]!r}")
    before, after = figures(stored), figures(new)
    shared = [name for name in before if name in after]
    if not shared:
        raise ValueError("the two results share no figure")
    lines = []
    for name in shared:
        (old, higher), (value, _) = before[name], after[name]
        change = old / value - 1 if higher else value / old - 1
        if change >= tolerance:
            lines.append(f"{name}: {value:.4g}, was {old:.4g}: {100 * change:.1f} % worse")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 0 done, 1 something is worse, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m server.engine.results")
    parser.add_argument("files", nargs="*", type=Path, metavar="RESULT.json")
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("STORED", "NEW"))
    asked = parser.parse_args(arguments)
    try:
        if asked.compare:
            return _compare_files(*asked.compare)
        text = render(asked.page.read_text(encoding="utf-8"), [_read(file) for file in asked.files])
        asked.page.write_text(text, encoding="utf-8")
    except (ValueError, KeyError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _compare_files(stored: Path, new: Path) -> int:
    worse = compare(_read(stored), _read(new))
    sys.stdout.write("".join(f"{line}\n" for line in worse) or f"nothing is {TOLERANCE:.0%} worse\n")
    return 1 if worse else 0


def _read(path: Path) -> Json:
    document: Json = json.loads(path.read_text(encoding="utf-8"))
    return document


if __name__ == "__main__":
    sys.exit(main())
