"""What the registry takes and gives. Times are seconds since the epoch, sizes bytes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date


@dataclass(frozen=True)
class Quotas:
    """Limits of one tenant; None is unlimited. `adapters` counts names, `bytes` their distinct revisions."""

    requests_per_second: float | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    adapters: int | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class TenantRow:
    """One tenant. `weight` is its share of the engine's tokens beside other tenants."""

    id: str
    weight: float = 1.0
    quotas: Quotas = field(default_factory=Quotas)
    default_router: str | None = None
    created: float = 0.0


@dataclass(frozen=True)
class KeyRow:
    """One API key: `salt` and `hash` are whatever its verifier made of the secret. `revoked`: since when, if it is."""

    id: str
    tenant: str
    label: str
    salt: bytes
    hash: bytes
    created: float = 0.0
    revoked: float | None = None


@dataclass(frozen=True)
class AdapterRow:
    """One adapter, whoever registered it; the blobs are the sha256 of its two PEFT files."""

    digest: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    modules: int
    bytes: int
    config_blob: str
    weights_blob: str
    warnings: tuple[str, ...] = ()
    created: float = 0.0


@dataclass(frozen=True)
class RevisionRow:
    """One digest that a name has pointed to; numbers start at 1. `recipe` is how it was merged, if it was."""

    number: int
    digest: str
    created: float
    recipe: dict[str, object] | None = None


@dataclass(frozen=True)
class NamedAdapter:
    """A name and the adapter that it points to. `revisions` are the name's that the tenant may use, oldest first.

    `requests` and `last_used` are those of the tenant that asks, not of the name's owner `tenant`.
    """

    tenant: str
    name: str
    adapter: AdapterRow
    public: bool
    pinned: bool
    description: str
    tags: tuple[str, ...]
    created: float
    requests: int
    last_used: float | None
    revisions: tuple[RevisionRow, ...]

    @property
    def recipe(self) -> dict[str, object] | None:
        """How the current revision was merged, if it was."""
        return next((each.recipe for each in self.revisions if each.digest == self.adapter.digest), None)


@dataclass(frozen=True)
class ModelRow:
    """The little that a list of models shows of a name; `tenant` is its owner."""

    tenant: str
    name: str
    digest: str
    public: bool
    created: float


@dataclass(frozen=True)
class Resolved:
    """What one `name` or `name@<digest prefix>` means for a tenant; `tenant` is the name's owner."""

    tenant: str
    name: str
    digest: str
    public: bool
    config_blob: str
    weights_blob: str


@dataclass(frozen=True)
class Use:
    """`requests` more requests of `tenant` on the adapter `name` of `owner`, the last one at `last_used`."""

    tenant: str
    owner: str
    name: str
    requests: int
    last_used: float


@dataclass(frozen=True)
class UsageRow:
    """One line of the ledger: a tenant's use of an adapter ("": the base model) on one day, in UTC."""

    tenant: str
    adapter: str
    day: date
    requests: int
    prompt_tokens: int
    generation_tokens: int


@dataclass(frozen=True)
class RouterRow:
    """One trained router; `blob` is the sha256 of its archive, `meta` what its inspection shows."""

    name: str
    kind: str
    blob: str
    meta: dict[str, object]
    created: float = 0.0


@dataclass(frozen=True)
class NewPrototype:
    """The prototypes of one name for one encoder: `vectors` are `count` x `width` float32, little-endian, row by row.

    `source` is the hash, by `source_of`, of the texts that they were made of.
    """

    tenant: str
    name: str
    encoder: str
    source: str
    vectors: bytes
    count: int
    width: int


@dataclass(frozen=True)
class PrototypeRow(NewPrototype):
    """Stored prototypes, with what their name is now."""

    public: bool
    version: int


@dataclass(frozen=True)
class TextsRow:
    """What a name can be found by. `stored` is the source of the prototypes that it has for the encoder in question."""

    tenant: str
    name: str
    samples: tuple[str, ...]
    description: str
    public: bool
    stored: str | None

    @property
    def texts(self) -> tuple[str, ...]:
        """What stands for the name; empty if nothing can find it."""
        return texts_of(self.samples, self.description)

    @property
    def source(self) -> str:
        """The hash of `texts`."""
        return source_of(self.texts)


def texts_of(samples: Sequence[str], description: str) -> tuple[str, ...]:
    """The texts that stand for a name: its samples, else its description, blank ones left out."""
    return tuple(text for text in samples if text.strip()) or ((description,) if description.strip() else ())


def source_of(texts: Sequence[str]) -> str:
    """sha256 over the texts in order, each behind its length in UTF-8 bytes."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()
