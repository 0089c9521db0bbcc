"""A run as Markdown and as one HTML file that needs nothing else."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from loadtests.plots import cumulative, plot
from loadtests.records import OK, Record, by

Json = dict[str, Any]

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; max-width: 46rem; display: block; margin: 1.5rem 0; }
"""
MOST_TENANTS = 6


def summary_rows(runs: Mapping[str, Json]) -> list[list[str]]:
    """A header, and a row for each run."""
    header = [
        "run",
        "requests",
        "failed",
        "output tokens/s",
        "TTFT p50 / p99 ms",
        "ITL p50 / p99 ms",
        "E2E p50 / p99 s",
    ]
    header += ["in time", "fairness, tenants", "fairness, adapters"]
    rows = [header]
    for name, run in runs.items():
        latency = run["all"]
        failed = run["requests"] - run["statuses"].get(OK, 0)
        rows.append(
            [
                name,
                f"{run['requests']:,}",
                f"{failed:,}",
                f"{run['tokens_per_second']:,.1f}",
                _pair(latency["ttft"], 1),
                _pair(latency["itl"], 1),
                _pair(latency["e2e"], 1000),
                _share(run["slo_attainment"]),
                _number(run["fairness_tenants"]),
                _number(run["fairness_adapters"]),
            ]
        )
    return rows


def split_rows(run: Json) -> list[list[str]]:
    """First uses of adapters, later uses, and each tenant."""
    parts = {"first use of an adapter": run["cold"], "other requests": run["warm"]}
    if len(run["tenants"]) > 1:
        parts |= {f"tenant {name}": own for name, own in run["tenants"].items()}
    rows = [["", "requests", "TTFT p50 / p99 ms", "ITL p50 / p99 ms", "E2E p50 / p99 s"]]
    for name, own in parts.items():
        latency = [_pair(own["ttft"], 1), _pair(own["itl"], 1), _pair(own["e2e"], 1000)]
        rows.append([name, f"{own['requests']:,}", *latency])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def html_page(title: str, runs: Mapping[str, tuple[Json, Sequence[Record]]]) -> str:
    """Tables and plots of all runs; light and dark as the reader's system is."""
    reports = {name: report for name, (report, _) in runs.items()}
    done = {name: [record for record in records if record.status == OK] for name, (_, records) in runs.items()}
    first = {name: cumulative([1e3 * r.first for r in own if r.first is not None]) for name, own in done.items()}
    gaps = {name: cumulative([1e3 * gap for record in own for gap in record.gaps]) for name, own in done.items()}
    body = [f"<h1>{escape(title)}</h1>", _table(summary_rows(reports))]
    body.append(plot("Share of first tokens within", "ms", first, log=True))
    body.append(plot("Share of gaps between tokens within", "ms", gaps, log=True))
    body.append(plot("Output tokens a second", "s", {name: over_time(own) for name, own in done.items()}))
    for name, (report, records) in runs.items():
        body += [f"<h2>{escape(name)}</h2>", _table(split_rows(report)), _table(_statuses(report))]
        own = by([record for record in records if record.status == OK], "tenant")
        if 1 < len(own) <= MOST_TENANTS:
            lines = {tenant: over_time(part) for tenant, part in own.items()}
            body.append(plot("Output tokens a second, by tenant", "s", lines))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>{"".join(body)}</body></html>'
    )


def over_time(records: Sequence[Record], parts: int = 60) -> list[tuple[float, float]]:
    """(second, pieces of answers a second) over the run, in `parts` equal parts."""
    moments = sorted(record.sent + time for record in records for time in record.times)
    if not moments or moments[-1] <= 0:
        return []
    width = moments[-1] / parts
    counts = [0] * parts
    for moment in moments:
        counts[min(parts - 1, int(moment / width))] += 1
    return [((place + 0.5) * width, count / width) for place, count in enumerate(counts)]


def _statuses(report: Json) -> list[list[str]]:
    return [["ended with", "requests"], *([name, f"{count:,}"] for name, count in sorted(report["statuses"].items()))]


def _table(rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(rows[0], "th") + "".join(line(row, "td") for row in rows[1:]) + "</table>"


def _pair(spread: Mapping[str, float], unit: float) -> str:
    if not spread:
        return ""
    return f"{spread['p50'] / unit:,.1f} / {spread['p99'] / unit:,.1f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
