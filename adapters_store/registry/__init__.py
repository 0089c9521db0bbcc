"""The registry: which adapters exist under which names, whose they are, who may call, and what was used.

All SQL is here. Every operation is one transaction; they may be called from any thread. Errors are RegistryError.
"""

from adapters_store.registry.accounts import DEFAULT_TENANT, Accounts
from adapters_store.registry.budgets import BudgetGrant, Budgets, BudgetWish, LocalBuckets, PlaceWish
from adapters_store.registry.checks import NAME_PATTERN
from adapters_store.registry.database import Database, open_engine
from adapters_store.registry.errors import (
    BeingDeleted,
    InvalidValue,
    NameTaken,
    NotFound,
    NotPermitted,
    OtherBaseModel,
    QuotaExceeded,
    RegistryError,
    RegistryUnavailable,
)
from adapters_store.registry.ledger import Ledger
from adapters_store.registry.migrations import SchemaTooNew
from adapters_store.registry.page import Page
from adapters_store.registry.prototypes import Prototypes
from adapters_store.registry.registration import Outcome, Registration
from adapters_store.registry.registry import Registry
from adapters_store.registry.resolution import MIN_PREFIX, may_be_meant
from adapters_store.registry.routers import Routers
from adapters_store.registry.rows import (
    AdapterRow,
    KeyRow,
    ModelRow,
    NamedAdapter,
    NewPrototype,
    PrototypeRow,
    Quotas,
    Resolved,
    RevisionRow,
    RouterRow,
    TenantRow,
    TextsRow,
    UsageRow,
    Use,
    source_of,
)

__all__ = [
    "DEFAULT_TENANT",
    "MIN_PREFIX",
    "NAME_PATTERN",
    "Accounts",
    "AdapterRow",
    "BeingDeleted",
    "BudgetGrant",
    "BudgetWish",
    "Budgets",
    "Database",
    "InvalidValue",
    "KeyRow",
    "Ledger",
    "LocalBuckets",
    "ModelRow",
    "NameTaken",
    "NamedAdapter",
    "NewPrototype",
    "NotFound",
    "NotPermitted",
    "OtherBaseModel",
    "Outcome",
    "Page",
    "PlaceWish",
    "PrototypeRow",
    "Prototypes",
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
    "TextsRow",
    "UsageRow",
    "Use",
    "may_be_meant",
    "open_engine",
    "source_of",
]
