"""Where a store lives."""

from dataclasses import dataclass, field
from pathlib import Path

from adapters_store.blobs import DEFAULT_CACHE_BYTES
from adapters_store.types import AdapterLimits


@dataclass(frozen=True)
class StoreConfig:
    """`folder` holds what need not survive the process; several processes may share all of it.

    `cache_bytes` bounds what `folder` keeps of blobs that live in an object store, `limits` each adapter.
    """

    database_url: str
    blob_url: str
    folder: Path
    cache_bytes: int = DEFAULT_CACHE_BYTES
    limits: AdapterLimits = field(default_factory=AdapterLimits)
