"""Budgets: quotas that several processes use up together."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

KEY = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "budgets",
        sa.Column("tenant", KEY, nullable=False),
        sa.Column("kind", KEY, nullable=False),
        sa.Column("level", sa.Double()),
        sa.Column("capacity", sa.Double(), nullable=False),
        sa.Column("time", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "kind", name="budgets_primary"),
    )
    op.create_table(
        "places",
        sa.Column("tenant", KEY, nullable=False),
        sa.Column("holder", KEY, nullable=False),
        sa.Column("places", sa.Integer(), nullable=False),
        sa.Column("until", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "holder", name="places_primary"),
    )
