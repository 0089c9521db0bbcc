"""What it costs to know whose key a request brings: `python -m server.bench_keys`. The last line printed is JSON."""

import asyncio
import json
import secrets
import time
from collections.abc import Sequence

from adapters_store.registry import TenantRow
from server.key_ring import KeyRing, make_key
from server.tenants import Keys, Tenants

KEYS = (10, 10_000)
"""Stored keys, each of a tenant of its own."""
CALLS = 20_000


def main() -> list[dict[str, float]]:
    """Measure, print a table and the JSON document."""
    rows = [asyncio.run(measure(count, CALLS)) for count in KEYS]
    print("stored keys | first use, ms | right key, us | wrong key, us")
    for row in rows:
        print(f"{row['keys']:11,} | {row['first_ms']:13.1f} | {row['right_us']:13.2f} | {row['wrong_us']:13.2f}")
    print(json.dumps({"bench": "keys", "rows": rows}))
    return rows


async def measure(count: int, calls: int) -> dict[str, float]:
    """Times with `count` keys: the first use of one, and then each of `calls` uses of it and of a wrong one."""
    tenants, ring = Tenants(), KeyRing()
    row, key = make_key("measured", "", secrets.token_bytes)
    others = [make_key(f"t{index}", "", secrets.token_bytes, lambda _, salt: salt)[0] for index in range(count - 1)]
    ring.replace([row, *others])
    tenants.replace([TenantRow(each.tenant) for each in (row, *others)])
    keys = Keys(api_keys=("configured",), admin_key="administrator", stored=ring, tenants=tenants)
    first = await _seconds(keys, [key])
    right = await _seconds(keys, [key] * calls)
    wrong = await _seconds(keys, [f"{key[:-4]}{'abcd' if key[-4:] != 'abcd' else 'abce'}"] * calls)
    return {"keys": count, "first_ms": first * 1e3, "right_us": right * 1e6, "wrong_us": wrong * 1e6}


async def _seconds(keys: Keys, given: Sequence[str]) -> float:
    """Of one key, on average."""
    started = time.perf_counter()
    for key in given:
        await keys.caller(key)
    return (time.perf_counter() - started) / len(given)


if __name__ == "__main__":
    main()
