"""The registry: which adapters exist under which names, whose they are, who may call, and what was used.

All SQL is here. Every operation is one transaction; they may be called from any thread. Errors are RegistryError.
"""

from adapters_store.registry.accounts import DEFAULT_TENANT, Accounts
from adapters_store.registry.checks import NAME_PATTERN
from adapters_store.registry.database import Database, open_engine
from adapters_store.registry.errors import (
    InvalidValue,
    NameTaken,
    NotFound,
    OtherBaseModel,
    QuotaExceeded,
    RegistryError,
    RegistryUnavailable,
)
from adapters_store.registry.ledger import Ledger
from adapters_store.registry.migrations import SchemaTooNew
from adapters_store.registry.page import Page
from adapters_store.registry.registration import Outcome, Registration
from adapters_store.registry.registry import Registry
from adapters_store.registry.resolution import MIN_PREFIX
from adapters_store.registry.routers import Routers
from adapters_store.registry.rows import (
    AdapterRow,
    KeyRow,
    ModelRow,
    NamedAdapter,
    Quotas,
    Resolved,
    RevisionRow,
    RouterRow,
    TenantRow,
    UsageRow,
    Use,
)

__all__ = [
    "DEFAULT_TENANT",
    "MIN_PREFIX",
    "NAME_PATTERN",
    "Accounts",
    "AdapterRow",
    "Database",
    "InvalidValue",
    "KeyRow",
    "Ledger",
    "ModelRow",
    "NameTaken",
    "NamedAdapter",
    "NotFound",
    "OtherBaseModel",
    "Outcome",
    "Page",
    "QuotaExceeded",
    "Quotas",
    "Registration",
    "Registry",
    "RegistryError",
    "RegistryUnavailable",
    "Resolved",
    "RevisionRow",
    "RouterRow",
    "Routers",
    "SchemaTooNew",
    "TenantRow",
    "UsageRow",
    "Use",
    "open_engine",
]
