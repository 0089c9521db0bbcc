"""How adapters, tenants, keys, usage and the engines' state look on a terminal. `now` is seconds since the epoch."""

from collections.abc import Mapping, Sequence
from typing import Any

from server.admin_tables import Column, Printer, ago, moment, number, quota, short, size

Json = Mapping[str, Any]

ADAPTERS = (
    Column("name", style="cyan"),
    Column("tenant", spare=4),
    Column("use", spare=3),
    Column("where"),
    Column("rank", right=True),
    Column("size", right=True),
    Column("requests", spare=2, right=True),
    Column("last used", spare=5),
    Column("tags", spare=6),
    Column("digest", spare=1),
)
REVISIONS = (Column("revision", right=True), Column("digest"), Column("registered"), Column(""))
TENANTS = (
    Column("tenant", style="cyan"),
    Column("weight", right=True),
    Column("requests/s", right=True),
    Column("tokens/min", right=True),
    Column("concurrency", right=True),
    Column("adapters", spare=1, right=True),
    Column("bytes", spare=2, right=True),
    Column("router", spare=4),
    Column("created", spare=3),
)
KEYS = (Column("key", style="cyan"), Column("label"), Column("created"), Column("state"))
USAGE = (
    Column("day"),
    Column("tenant", style="cyan"),
    Column("adapters", style="cyan"),
    Column("requests", right=True),
    Column("prompt tokens", right=True),
    Column("output tokens", right=True),
)
ENGINES = (
    Column("engine", style="cyan"),
    Column("state"),
    Column("device", spare=2),
    Column("dtype", spare=3),
    Column("running", right=True),
    Column("waiting", right=True),
    Column("KV blocks", right=True),
    Column("preemptions", spare=1, right=True),
)


def print_adapters(out: Printer, rows: Sequence[Json], now: float) -> None:
    out.table(ADAPTERS, [_adapter_cells(row, now) for row in rows], empty="no adapters")


def _adapter_cells(row: Json, now: float) -> tuple[object, ...]:
    return (
        row["name"],
        row["tenant"],
        "public" if row["public"] else "private",
        f"{row['residency']}, pinned" if row["pinned"] else row["residency"],
        row["rank"],
        size(row["bytes"]),
        number(row["requests"]),
        ago(row["last_used"], now),
        ", ".join(row["tags"]),
        short(row["digest"]),
    )


def print_adapter(out: Printer, row: Json, now: float) -> None:
    """One adapter with its revisions."""
    out.details(
        [
            ("name", row["name"]),
            ("digest", row["digest"]),
            ("tenant", row["tenant"]),
            ("use", "public" if row["public"] else "private"),
            ("where", row["residency"]),
            ("pinned", "yes" if row["pinned"] else "no"),
            *_weights(row),
            ("running", f"{number(row['leases'])} requests"),
            ("requests", number(row["requests"])),
            ("last used", moment(row["last_used"], now)),
            ("created", moment(row["created"], now)),
            ("tags", ", ".join(row["tags"])),
            ("description", row["description"]),
            ("merged from", _recipe(row.get("recipe"))),
        ]
    )
    revisions = [
        (
            index,
            short(each["digest"]),
            moment(each["created"], now),
            "current" if each["digest"] == row["digest"] else "",
        )
        for index, each in enumerate(row["revisions"], 1)
    ]
    out.line("")
    out.table(REVISIONS, revisions)


def print_registered(out: Printer, row: Json) -> None:
    """A registration that is done."""
    out.line(f"registered {row['name']}", style="green")
    count = len(row["revisions"])
    out.details([("digest", row["digest"]), ("revisions", count if count > 1 else None), *_weights(row)])
    for warning in row.get("warnings", ()):
        out.line(f"warning: {warning}", style="yellow")


def _weights(row: Json) -> list[tuple[str, object]]:
    return [
        ("rank", f"{row['rank']} (alpha {row['alpha']:g})"),
        ("targets", ", ".join(row["targets"])),
        ("modules", number(row["modules"])),
        ("size", f"{size(row['bytes'])} ({number(row['bytes'])} bytes)"),
    ]


def _recipe(recipe: Json | None) -> str:
    if not recipe:
        return ""
    terms = " ".join(f"{each.get('name', short(each['digest']))}={each['weight']:g}" for each in recipe["adapters"])
    rest = [f"{name} {recipe[name]:g}" for name in ("rank", "density", "seed") if recipe.get(name) is not None]
    return ", ".join([f"{terms} by {recipe['method']}", *rest])


def print_tenants(out: Printer, rows: Sequence[Json], now: float) -> None:
    out.table(TENANTS, [_tenant_cells(row, now) for row in rows], empty="no tenants")


def _tenant_cells(row: Json, now: float) -> tuple[object, ...]:
    limits = row["quotas"]
    return (
        row["id"],
        f"{row['weight']:g}",
        quota(limits["requests_per_second"]),
        quota(limits["tokens_per_minute"]),
        quota(limits["concurrency"]),
        quota(limits["adapters"]),
        "-" if limits["bytes"] is None else size(limits["bytes"]),
        row["default_router"] or "-",
        ago(row["created"], now),
    )


def print_tenant(out: Printer, row: Json, now: float) -> None:
    """One tenant; what it has no quota for is unlimited."""
    limits = row["quotas"]
    counted = ("requests_per_second", "tokens_per_minute", "concurrency", "adapters")
    out.details(
        [
            ("tenant", row["id"]),
            ("weight", f"{row['weight']:g}"),
            *((name.replace("_", " "), quota(limits[name], "unlimited")) for name in counted),
            ("bytes", "unlimited" if limits["bytes"] is None else size(limits["bytes"])),
            ("default router", row["default_router"]),
            ("created", moment(row["created"], now)),
        ]
    )


def print_keys(out: Printer, rows: Sequence[Json], now: float) -> None:
    cells = [
        (
            row["id"],
            row["label"],
            ago(row["created"], now),
            "active" if row["revoked"] is None else f"revoked {ago(row['revoked'], now)}",
        )
        for row in rows
    ]
    out.table(KEYS, cells, empty="no keys")


def print_usage(out: Printer, rows: Sequence[Json]) -> None:
    """The ledger and, below more than one line, its sums."""
    counts = ("requests", "prompt_tokens", "generation_tokens")
    cells = [
        (row["day"], row["tenant"], row["adapter"] or "(base model)", *(number(row[name]) for name in counts))
        for row in rows
    ]
    if len(rows) > 1:
        cells.append(("total", "", "", *(number(sum(row[name] for row in rows)) for name in counts)))
    out.table(USAGE, cells, empty="no use yet")


def print_state(out: Printer, state: Json) -> None:
    """The server, and below it its engines."""
    out.details(
        [
            ("server", "draining: refuses new requests" if state["draining"] else "serving"),
            ("up", _duration(state["uptime_seconds"])),
            ("requests", number(state["requests"])),
            ("sequences", f"{number(state['running'])} running, {number(state['waiting'])} waiting"),
            ("oldest", _ages(state)),
            ("uploads", number(state["uploads"])),
        ]
    )
    out.line("")
    out.table(ENGINES, [_engine_cells(engine) for engine in state["engines"]], empty="no engines")
    for engine in state["engines"]:
        name = engine["id"]
        out.details(
            [
                (f"engine {name} pages", _counts(engine["pages"])),
                (f"engine {name} adapters", _counts(engine["adapters"])),
                (
                    f"engine {name} memory",
                    ", ".join(f"{size(count)} {what}" for what, count in engine["memory"].items()),
                ),
            ]
        )


def _engine_cells(engine: Json) -> tuple[object, ...]:
    return (
        engine["id"],
        "alive" if engine["alive"] else "DOWN",
        engine["device"] or "-",
        engine["dtype"] or "-",
        number(engine["running"]),
        number(engine["waiting"]),
        f"{number(engine['kv_used_blocks'])} of {number(engine['kv_blocks'])}",
        number(engine["preemptions"]),
    )


def _ages(state: Json) -> str:
    ages = (("waiting", state["oldest_waiting_seconds"]), ("running", state["oldest_running_seconds"]))
    return ", ".join(f"{what} for {_duration(age)}" for what, age in ages if age is not None)


def _counts(counts: Json) -> str:
    return ", ".join(f"{number(count)} {what}" for what, count in counts.items())


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"
