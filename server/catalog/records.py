"""What the catalog takes and gives."""

from dataclasses import dataclass, replace
from typing import Any

from adapters_store.merging import MergeMethod
from adapters_store.registry import MIN_PREFIX, NamedAdapter, NotFound, Resolved
from adapters_store.source_policy import SourcePolicy
from server.catalog.residency import Tier
from server.tenants import Caller


@dataclass(frozen=True)
class Policies:
    """What registrations may read: the administrator's, and the tenants', who never get the server's own rights."""

    admin: SourcePolicy
    tenants: SourcePolicy

    @classmethod
    def of(cls, admin: SourcePolicy) -> "Policies":
        """Tenants read what everybody can: no folder, bucket, private repository or private network."""
        return cls(
            admin,
            replace(admin, file_roots=(), s3_buckets=frozenset(), hub_token=None, networks=()),
        )

    def of_caller(self, caller: Caller) -> SourcePolicy:
        return self.admin if caller.admin else self.tenants


@dataclass(frozen=True)
class Shown:
    """An adapter as one tenant sees it; `leases` counts that tenant's requests that use it now.

    `is_own`: the name is the tenant's, and not a public one of others.
    """

    adapter: NamedAdapter
    residency: Tier
    leases: int
    is_own: bool


@dataclass(frozen=True)
class Added:
    """A registration that is done. `modules_touched` are names such as `layers.0.self_attn.q_proj`."""

    shown: Shown
    modules_touched: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Changes:
    """What is None stays as it is. `digest` is the beginning of one of the name's revisions."""

    digest: str | None = None
    public: bool | None = None
    pinned: bool | None = None
    description: str | None = None
    tags: tuple[str, ...] | None = None
    samples: tuple[str, ...] | None = None

    def settings(self) -> dict[str, Any]:
        """What the registry changes."""
        fields = ("public", "pinned", "description", "tags", "samples")
        return {name: getattr(self, name) for name in fields if getattr(self, name) is not None}


@dataclass(frozen=True)
class Recipe:
    """A merge: names, perhaps with the beginning of a digest, and their weights, and how."""

    entries: tuple[tuple[str, float], ...]
    method: MergeMethod
    rank: int | None = None
    density: float | None = None
    seed: int = 0


def resolved(adapter: NamedAdapter) -> Resolved:
    """The name's current revision."""
    stored = adapter.adapter
    return Resolved(
        adapter.tenant, adapter.name, stored.digest, adapter.public, stored.config_blob, stored.weights_blob
    )


def revision_of(adapter: NamedAdapter, prefix: str | None) -> str:
    """The digest of the revision that is meant, None for the current one. Raises NotFound."""
    if prefix is None:
        return adapter.adapter.digest
    found = [each.digest for each in adapter.revisions if each.digest.startswith(prefix.lower())]
    if len(prefix) < MIN_PREFIX or len(found) != 1:
        raise NotFound("revision", f"{adapter.name}@{prefix}")
    return found[0]
