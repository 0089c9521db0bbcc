"""A process that routes by the prototypes of a registry."""

from types import SimpleNamespace
from typing import Any

from adapters_store.registry import DEFAULT_TENANT, AdapterRow, Registry
from routing.prototype_index import PrototypeIndex
from routing.prototype_sync import PrototypeSync
from tests.routing.prototype_world import ChosenEncoder, unit

ROW = AdapterRow("a" * 64, 8, 16.0, ("q_proj",), 2, 100, "b" * 64, "c" * 64)


class Process:
    """One process on the registry."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.encoder = ChosenEncoder(3)
        self.index = PrototypeIndex(3)
        store: Any = SimpleNamespace(registry=registry)
        self.sync = PrototypeSync(store, self.encoder, self.index)

    def add(self, name: str, *samples: str, tenant: str = DEFAULT_TENANT, **options: Any) -> None:
        self.registry.register(tenant, name, ROW, samples=samples, replace=True, **options)

    def found(self, tenant: str = DEFAULT_TENANT) -> list[str]:
        self.index.check_integrity()
        return sorted(hit.name for hit in self.index.search(tenant, unit(1, 1, 1)))
