"""Identity, tenants, keys, adapters with their names and revisions, the ledger of use, routers."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

KEY = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "identity",
        sa.Column("key", KEY, nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key", name="identity_primary"),
    )
    op.create_table(
        "adapters",
        sa.Column("digest", KEY, nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("alpha", sa.Double(), nullable=False),
        sa.Column("targets", sa.JSON(), nullable=False),
        sa.Column("modules", sa.Integer(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("warnings", sa.JSON(), nullable=False),
        sa.Column("config_blob", KEY, nullable=False),
        sa.Column("weights_blob", KEY, nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="adapters_primary"),
    )
    op.create_table(
        "routers",
        sa.Column("name", KEY, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("blob", KEY, nullable=False),
        sa.Column("meta", sa.JSON(), nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="routers_primary"),
    )
    op.create_table(
        "tenants",
        sa.Column("id", KEY, nullable=False),
        sa.Column("weight", sa.Double(), nullable=False),
        sa.Column("requests_per_second", sa.Double(), nullable=True),
        sa.Column("tokens_per_minute", sa.BigInteger(), nullable=True),
        sa.Column("concurrency", sa.BigInteger(), nullable=True),
        sa.Column("adapters", sa.BigInteger(), nullable=True),
        sa.Column("bytes", sa.BigInteger(), nullable=True),
        sa.Column("default_router", KEY, nullable=True),
        sa.Column("created", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="tenants_primary"),
    )
    op.create_table(
        "usage",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("tenant", KEY, nullable=False),
        sa.Column("adapter", KEY, nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("generation_tokens", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("day", "tenant", "adapter", name="usage_primary"),
    )
    op.create_index("usage_tenant_day_index", "usage", ["tenant", "day"], unique=False)
    op.create_table(
        "keys",
        sa.Column("id", KEY, nullable=False),
        sa.Column("tenant", KEY, nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("salt", sa.LargeBinary(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("revoked", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], name="keys_tenant_foreign", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="keys_primary"),
    )
    op.create_index("keys_tenant_index", "keys", ["tenant"], unique=False)
    op.create_table(
        "names",
        sa.Column("tenant", KEY, nullable=False),
        sa.Column("name", KEY, nullable=False),
        sa.Column("digest", KEY, nullable=False),
        sa.Column("public", sa.Boolean(), nullable=False),
        sa.Column("pinned", sa.Boolean(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("samples", sa.JSON(), nullable=False),
        sa.Column("deleting", sa.Boolean(), nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["digest"], ["adapters.digest"], name="names_digest_foreign"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], name="names_tenant_foreign"),
        sa.PrimaryKeyConstraint("tenant", "name", name="names_primary"),
    )
    op.create_index("names_digest_index", "names", ["digest"], unique=False)
    op.create_index(
        "names_public_unique",
        "names",
        ["name"],
        unique=True,
        sqlite_where=sa.text("public = 1"),
        postgresql_where=sa.text("public"),
    )
    op.create_table(
        "revisions",
        sa.Column("tenant", KEY, nullable=False),
        sa.Column("name", KEY, nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("digest", KEY, nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("recipe", sa.JSON(none_as_null=True), nullable=True),
        sa.ForeignKeyConstraint(["digest"], ["adapters.digest"], name="revisions_digest_foreign"),
        sa.ForeignKeyConstraint(
            ["tenant", "name"], ["names.tenant", "names.name"], name="revisions_tenant_name_foreign", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("tenant", "name", "number", name="revisions_primary"),
        sa.UniqueConstraint("tenant", "name", "digest", name="revisions_tenant_name_digest_unique"),
    )
    op.create_index("revisions_digest_index", "revisions", ["digest"], unique=False)
    op.create_table(
        "tags",
        sa.Column("tenant", KEY, nullable=False),
        sa.Column("name", KEY, nullable=False),
        sa.Column("tag", KEY, nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "name"], ["names.tenant", "names.name"], name="tags_tenant_name_foreign", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("tenant", "name", "tag", name="tags_primary"),
    )
    op.create_table(
        "uses",
        sa.Column("owner", KEY, nullable=False),
        sa.Column("name", KEY, nullable=False),
        sa.Column("tenant", KEY, nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("last_used", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["owner", "name"], ["names.tenant", "names.name"], name="uses_owner_name_foreign", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("owner", "name", "tenant", name="uses_primary"),
    )
