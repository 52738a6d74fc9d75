"""Messages of secure sums, and the transcript of an opened one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table and the column; rounds so far have no transcript."""
    op.create_table(
        "secure_messages",
        sa.Column("run_id", sa.Text(), nullable=False, comment="of which run"),
        sa.Column(
            "number", sa.Integer(), autoincrement=False, nullable=False, comment="of which round"
        ),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False, comment="from 1"),
        sa.Column("kind", sa.Text(), nullable=False, comment="of the message"),
        sa.Column("node_id", sa.Text(), nullable=False, comment="who signed it"),
        sa.Column("body", sa.LargeBinary(), nullable=False, comment="canonical JSON, signed"),
        sa.Column("received_at", sa.BigInteger(), nullable=False, comment="Unix ms UTC"),
        sa.ForeignKeyConstraint(
            ["node_id"], ["nodes.node_id"], name=op.f("fk_secure_messages_nodes")
        ),
        sa.ForeignKeyConstraint(
            ["run_id", "number"],
            ["rounds.run_id", "rounds.number"],
            name=op.f("fk_secure_messages_rounds"),
        ),
        sa.PrimaryKeyConstraint(
            "run_id", "number", "attempt", "kind", "node_id", name=op.f("pk_secure_messages")
        ),
        comment="Messages of secure sums as they came; the first of each kind stays",
    )
    op.add_column(
        "rounds",
        sa.Column(
            "transcript",
            sa.Text(),
            nullable=True,
            comment="hex digest of the blob that says how the sum was opened; NULL: no secure sum",
        ),
    )


def downgrade() -> None:
    """Remove them; rounds keep their results."""
    op.drop_column("rounds", "transcript")
    op.drop_table("secure_messages")
