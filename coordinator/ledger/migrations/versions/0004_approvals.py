"""By which statement of its institution a node was enrolled."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; nodes so far were enrolled without governance."""
    op.add_column(
        "nodes",
        sa.Column(
            "approval",
            sa.LargeBinary(),
            comment="canonical JSON, signed by the institution; NULL: enrolled without governance",
        ),
    )


def downgrade() -> None:
    """Remove it."""
    op.drop_column("nodes", "approval")
