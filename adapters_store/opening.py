"""Opening what a store is made of."""

import uuid
from collections.abc import Callable

from adapters_store.blobs import BlobError, BlobStore, Fault, no_fault
from adapters_store.registry import Registry, RegistryError, SchemaTooNew
from adapters_store.store_config import StoreConfig
from adapters_store.types import LinearShape
from adapters_store.work_folder import WorkFolder


class StoreOpenError(RuntimeError):
    """A store that cannot be opened, in one sentence."""


def open_parts(
    shape: LinearShape, config: StoreConfig, clock: Callable[[], float], fault: Fault = no_fault
) -> tuple[Registry, BlobStore, WorkFolder]:
    """Registry and blobs, which belong to each other and to models of this shape, and a fresh work folder. Blocks.

    `clock` gives seconds since the epoch. Raises StoreOpenError.
    """
    try:
        registry = Registry.open(config.database_url, clock, fault)
    except (ValueError, OSError, RegistryError, SchemaTooNew) as error:
        raise StoreOpenError(str(error)) from error
    try:
        owner = registry.claim(shape.fingerprint, uuid.uuid4().hex)
        blobs = BlobStore.open(config.blob_url, config.folder / "cache", config.cache_bytes, fault)
        blobs.claim(owner)
        return registry, blobs, WorkFolder(config.folder)
    except (ValueError, RegistryError, BlobError) as error:
        registry.close()
        raise StoreOpenError(str(error)) from error
