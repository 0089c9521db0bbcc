"""The registry's tables. Times are seconds since the epoch, sizes bytes."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Date,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "%(table_name)s_%(column_0_N_name)s_index",
        "uq": "%(table_name)s_%(column_0_N_name)s_unique",
        "fk": "%(table_name)s_%(column_0_N_name)s_foreign",
        "pk": "%(table_name)s_primary",
    }
)

# Ordered by code point in every database: pages of a list and prefixes of digests depend on it.
Key = String().with_variant(String(collation="C"), "postgresql")

# Whose registry this is: its own id, and the base model that its adapters fit; how often its accounts and its
# prototypes have changed.
identity = Table(
    "identity",
    metadata,
    Column("key", Key, primary_key=True),
    Column("value", Text, nullable=False),
)

tenants = Table(
    "tenants",
    metadata,
    Column("id", Key, primary_key=True),
    Column("weight", Double, nullable=False),
    Column("requests_per_second", Double),
    Column("tokens_per_minute", BigInteger),
    Column("concurrency", BigInteger),
    Column("adapters", BigInteger),
    Column("bytes", BigInteger),
    Column("default_router", Key),
    Column("created", Double, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", Key, primary_key=True),
    Column("tenant", Key, ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("label", Text, nullable=False),
    Column("salt", LargeBinary, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("created", Double, nullable=False),
    Column("revoked", Double),
)

adapters = Table(
    "adapters",
    metadata,
    Column("digest", Key, primary_key=True),
    Column("rank", Integer, nullable=False),
    Column("alpha", Double, nullable=False),
    Column("targets", JSON, nullable=False),
    Column("modules", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("warnings", JSON, nullable=False),
    Column("config_blob", Key, nullable=False),
    Column("weights_blob", Key, nullable=False),
    Column("created", Double, nullable=False),
)

names = Table(
    "names",
    metadata,
    Column("tenant", Key, ForeignKey("tenants.id"), primary_key=True),
    Column("name", Key, primary_key=True),
    Column("digest", Key, ForeignKey("adapters.digest"), nullable=False, index=True),
    Column("public", Boolean, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("description", Text, nullable=False),
    Column("samples", JSON, nullable=False),
    Column("deleting", Boolean, nullable=False),
    Column("created", Double, nullable=False),
)
# SQLite uses a partial index for a query only if its condition reads as the query's, which is how SQLAlchemy spells it.
Index(
    "names_public_unique",
    names.c.name,
    unique=True,
    sqlite_where=text("public = 1"),
    postgresql_where=text("public"),
)


def _of_name(tenant: str, name: str) -> ForeignKeyConstraint:
    return ForeignKeyConstraint([tenant, name], ["names.tenant", "names.name"], ondelete="CASCADE")


revisions = Table(
    "revisions",
    metadata,
    Column("tenant", Key, primary_key=True),
    Column("name", Key, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("digest", Key, ForeignKey("adapters.digest"), nullable=False, index=True),
    Column("created", Double, nullable=False),
    Column("recipe", JSON(none_as_null=True)),
    UniqueConstraint("tenant", "name", "digest"),
    _of_name("tenant", "name"),
)

tags = Table(
    "tags",
    metadata,
    Column("tenant", Key, primary_key=True),
    Column("name", Key, primary_key=True),
    Column("tag", Key, primary_key=True),
    _of_name("tenant", "name"),
)

# Counters of (caller's tenant, adapter): a public adapter's owner does not see how much others use it, nor they.
uses = Table(
    "uses",
    metadata,
    Column("owner", Key, primary_key=True),
    Column("name", Key, primary_key=True),
    Column("tenant", Key, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("last_used", Double, nullable=False),
    _of_name("owner", "name"),
)

# No foreign keys: what was used stays on the ledger when an adapter or a tenant goes.
usage = Table(
    "usage",
    metadata,
    Column("day", Date, primary_key=True),
    Column("tenant", Key, primary_key=True),
    Column("adapter", Key, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("generation_tokens", BigInteger, nullable=False),
    Index("usage_tenant_day_index", "tenant", "day"),
)

routers = Table(
    "routers",
    metadata,
    Column("name", Key, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("blob", Key, nullable=False),
    Column("meta", JSON, nullable=False),
    Column("created", Double, nullable=False),
)

# What finds an adapter by a prompt: unit vectors of one encoder's space, `source` a hash of the texts that they stand
# for. Versions of all tenants are drawn from one counter, so that a reader asks for what is newer than its last one.
prototypes = Table(
    "prototypes",
    metadata,
    Column("tenant", Key, primary_key=True),
    Column("name", Key, primary_key=True),
    Column("encoder", Key, primary_key=True),
    Column("source", Key, nullable=False),
    Column("vectors", LargeBinary, nullable=False),
    Column("count", Integer, nullable=False),
    Column("width", Integer, nullable=False),
    Column("version", BigInteger, nullable=False),
    Index("prototypes_encoder_version_index", "encoder", "version"),
    _of_name("tenant", "name"),
)

# The number of the last batch that each process has added to `usage`: one that is sent again is known by it.
usage_writers = Table(
    "usage_writers",
    metadata,
    Column("writer", Key, primary_key=True),
    Column("batch", Integer, nullable=False),
)

# Quotas that several processes use up together: what is left of a bucket, and of sequences at once who has how many.
# No foreign keys: a row more or less means nothing.
budgets = Table(
    "budgets",
    metadata,
    Column("tenant", Key, primary_key=True),
    Column("kind", Key, primary_key=True),
    Column("level", Double),
    Column("capacity", Double, nullable=False),
    Column("time", Double, nullable=False),
)

places = Table(
    "places",
    metadata,
    Column("tenant", Key, primary_key=True),
    Column("holder", Key, primary_key=True),
    Column("places", Integer, nullable=False),
    Column("until", Double, nullable=False),
)
