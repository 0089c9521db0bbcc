"""The adapters as callers manage them: the store and the engine's memory together, within each caller's rights."""

from server.catalog.catalog import Catalog
from server.catalog.engine import TieredEngine
from server.catalog.policy import policies
from server.catalog.records import Added, Changes, Policies, Recipe, Shown
from server.catalog.rights import check_new, tenant_of

__all__ = [
    "Added",
    "Catalog",
    "Changes",
    "Policies",
    "Recipe",
    "Shown",
    "TieredEngine",
    "check_new",
    "policies",
    "tenant_of",
]
