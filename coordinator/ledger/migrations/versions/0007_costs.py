"""What local steps cost, as nodes claim it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table."""
    op.create_table(
        "costs",
        sa.Column("run_id", sa.Text(), nullable=False, comment="of which run"),
        sa.Column(
            "number", sa.Integer(), autoincrement=False, nullable=False, comment="of which round"
        ),
        sa.Column("node_id", sa.Text(), nullable=False, comment="who says it"),
        sa.Column("gpu_ms", sa.BigInteger(), nullable=False, comment="devices held, milliseconds"),
        sa.Column("cpu_ms", sa.BigInteger(), nullable=False, comment="milliseconds"),
        sa.Column("energy_mwh", sa.BigInteger(), nullable=False, comment="milliwatt hours"),
        sa.Column(
            "source", sa.Text(), nullable=False, comment="of the energy: measured|estimated|none"
        ),
        sa.Column("received_at", sa.BigInteger(), nullable=False, comment="Unix ms UTC"),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.node_id"], name=op.f("fk_costs_nodes")),
        sa.ForeignKeyConstraint(
            ["run_id", "number"], ["rounds.run_id", "rounds.number"], name=op.f("fk_costs_rounds")
        ),
        sa.PrimaryKeyConstraint("run_id", "number", "node_id", name=op.f("pk_costs")),
        comment="What a local step cost, as the node claims it",
    )


def downgrade() -> None:
    """Remove it."""
    op.drop_table("costs")
