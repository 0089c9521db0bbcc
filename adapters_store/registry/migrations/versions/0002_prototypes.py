"""Prototypes: what finds an adapter by a prompt."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

KEY = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "prototypes",
        sa.Column("tenant", KEY, nullable=False),
        sa.Column("name", KEY, nullable=False),
        sa.Column("encoder", KEY, nullable=False),
        sa.Column("source", KEY, nullable=False),
        sa.Column("vectors", sa.LargeBinary(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "name"],
            ["names.tenant", "names.name"],
            name="prototypes_tenant_name_foreign",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("tenant", "name", "encoder", name="prototypes_primary"),
    )
    op.create_index("prototypes_encoder_version_index", "prototypes", ["encoder", "version"], unique=False)
