"""What private runs cost, and what institutions' data have spent."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the tables; runs so far are not private."""
    op.create_table(
        "privacy_claims",
        sa.Column("run_id", sa.Text(), nullable=False, comment="of which run"),
        sa.Column(
            "claim",
            sa.LargeBinary(),
            nullable=False,
            comment="canonical JSON: what a training round costs each institution",
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_privacy_claims_runs")),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_privacy_claims")),
        comment="Runs in private modes and what their rounds cost",
    )
    op.create_table(
        "privacy_spends",
        sa.Column("run_id", sa.Text(), nullable=False, comment="of which run"),
        sa.Column(
            "number", sa.Integer(), autoincrement=False, nullable=False, comment="of which round"
        ),
        sa.Column("node_id", sa.Text(), nullable=False, comment="whose data"),
        sa.Column("dataset", sa.Text(), nullable=False, comment="which of its data"),
        sa.Column(
            "claim", sa.LargeBinary(), nullable=False, comment="canonical JSON: what it costs"
        ),
        sa.Column(
            "status", sa.Text(), nullable=False, comment="reserved | released | burned | void"
        ),
        sa.Column("reserved_at", sa.BigInteger(), nullable=False, comment="Unix ms UTC"),
        sa.Column("settled_at", sa.BigInteger(), comment="Unix ms UTC; NULL: reserved"),
        sa.CheckConstraint(
            "status IN ('reserved', 'released', 'burned', 'void')",
            name=op.f("ck_privacy_spends_status"),
        ),
        sa.CheckConstraint(
            "(status = 'reserved') = (settled_at IS NULL)",
            name=op.f("ck_privacy_spends_settled"),
        ),
        sa.ForeignKeyConstraint(
            ["node_id"], ["nodes.node_id"], name=op.f("fk_privacy_spends_nodes")
        ),
        sa.ForeignKeyConstraint(
            ["run_id", "number"],
            ["rounds.run_id", "rounds.number"],
            name=op.f("fk_privacy_spends_rounds"),
        ),
        sa.PrimaryKeyConstraint("run_id", "number", "node_id", name=op.f("pk_privacy_spends")),
        comment="Privacy that institutions' data have spent; all but void counts",
    )
    op.create_index("ix_privacy_spends_data", "privacy_spends", ["node_id", "dataset"])


def downgrade() -> None:
    """Forget what was spent: only for a ledger that is thrown away."""
    op.drop_index("ix_privacy_spends_data", table_name="privacy_spends")
    op.drop_table("privacy_spends")
    op.drop_table("privacy_claims")
