"""The operator's signed request of a run."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; runs so far were not signed for."""
    op.add_column(
        "runs",
        sa.Column(
            "request",
            sa.LargeBinary(),
            nullable=True,
            comment="JSON: the operator's signed request; NULL: it was not signed",
        ),
    )


def downgrade() -> None:
    """Remove it; the plan leaves keep their copies."""
    op.drop_column("runs", "request")
