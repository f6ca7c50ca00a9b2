"""The table of checked entries."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "entries"
down_revision = None


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "entries",
        sa.Column("kind", sa.String(16), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("checksum", sa.String(64), nullable=False),
    )


def downgrade() -> None:
    """Remove the table."""
    op.drop_table("entries")
