"""The round log: leaves in order, the chain of each signer, the size."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the tables; the log is empty until the coordinator begins it."""
    op.create_table(
        "log_leaf",
        sa.Column(
            "index",
            sa.BigInteger(),
            autoincrement=False,
            nullable=False,
            comment="from 0, without gaps, in order of commit",
        ),
        sa.Column("leaf_hash", sa.Text(), nullable=False, comment="hex, of the entry"),
        sa.Column(
            "root", sa.Text(), nullable=False, comment="hex, of the tree that ends with this leaf"
        ),
        sa.Column(
            "entry", sa.LargeBinary(), nullable=False, comment="DSSE envelope, canonical JSON"
        ),
        sa.Column("kind", sa.Text(), nullable=False, comment="e.g. round.plan"),
        sa.Column("signer", sa.Text(), nullable=False, comment="hex key id of who signed it"),
        sa.Column(
            "run_id", sa.Text(), nullable=True, comment="of which run; NULL: not about a round"
        ),
        sa.Column(
            "number",
            sa.Integer(),
            nullable=True,
            comment="of which round; NULL: not about a round",
        ),
        sa.Column(
            "attempt",
            sa.Integer(),
            nullable=True,
            comment="of which attempt; NULL: the kind has none",
        ),
        sa.Column("logged_at", sa.BigInteger(), nullable=False, comment="Unix ms UTC"),
        sa.PrimaryKeyConstraint("index", name=op.f("pk_log_leaf")),
        sa.UniqueConstraint("leaf_hash", name=op.f("uq_log_leaf_leaf_hash")),
        comment="The round log; rows are never changed or removed, the files are made of them",
    )
    op.create_index("ix_log_leaf_round", "log_leaf", ["run_id", "number", "kind"])
    op.create_table(
        "log_chain",
        sa.Column("signer", sa.Text(), nullable=False, comment="hex key id"),
        sa.Column("seq", sa.BigInteger(), nullable=False, comment="of its last leaf, from 1"),
        sa.Column("leaf_hash", sa.Text(), nullable=False, comment="hex, of its last leaf"),
        sa.PrimaryKeyConstraint("signer", name=op.f("pk_log_chain")),
        comment="The head of each signer's chain of leaves",
    )
    op.create_table(
        "log_size",
        sa.Column("one", sa.Integer(), autoincrement=False, nullable=False, comment="always 1"),
        sa.Column("value", sa.BigInteger(), nullable=False, comment="leaves"),
        sa.CheckConstraint("one = 1", name=op.f("ck_log_size_one")),
        sa.PrimaryKeyConstraint("one", name=op.f("pk_log_size")),
        comment="One row; its lock gives leaves their index in order of commit",
    )
    op.execute("INSERT INTO log_size (one, value) VALUES (1, 0)")


def downgrade() -> None:
    """Remove them; the files of the log stay where they are."""
    op.drop_table("log_size")
    op.drop_table("log_chain")
    op.drop_table("log_leaf")
