"""Adapters to register, and many calls of a registry at once."""

import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date

from adapters_store.registry import AdapterRow, Registry, RegistryError

MakeUrl = Callable[..., str]
DAY = date(2026, 3, 1)


def adapter(digit: str, *, size: int = 100) -> AdapterRow:
    """An adapter whose digest and blobs repeat one hexadecimal digit."""
    return AdapterRow(
        digest=digit * 64,
        rank=8,
        alpha=16.0,
        targets=("q_proj", "v_proj"),
        modules=4,
        bytes=size,
        config_blob="c" + digit * 63,
        weights_blob="d" + digit * 63,
        warnings=("trained on another base model",),
    )


def parallel(count: int, call: Callable[[int], object]) -> list[object]:
    """What each of `count` calls returned or, if it was a RegistryError, raised."""

    def one(index: int) -> object:
        try:
            return call(index)
        except RegistryError as error:
            return error

    with ThreadPoolExecutor(24) as pool:
        return list(pool.map(one, range(count)))


def names_of(registry: Registry, tenant: str, **options: object) -> list[tuple[str, str]]:
    return [(each.tenant, each.name) for each in registry.list(tenant, **options).items]  # type: ignore[arg-type]


def forget_syncing(connection: sqlite3.Connection, _record: object) -> None:
    """Most tests need no disk to be written: half of their time would be waiting for it."""
    connection.execute("PRAGMA synchronous = OFF")
