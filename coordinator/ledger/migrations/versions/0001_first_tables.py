"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make every table; history is empty."""
    op.create_table(
        "certificates",
        sa.Column("serial", sa.Text(), nullable=False, comment="hexadecimal"),
        sa.Column(
            "spki_sha256", sa.Text(), nullable=False, comment="hex SHA-256 of the public key info"
        ),
        sa.Column(
            "subject_role", sa.Text(), nullable=False, comment="node | operator | coordinator"
        ),
        sa.Column("subject_name", sa.Text(), nullable=False, comment="node id or operator name"),
        sa.Column("not_after", sa.BigInteger(), nullable=False, comment="Unix ms UTC"),
        sa.Column("der", sa.LargeBinary(), nullable=False, comment="the certificate, DER"),
        sa.PrimaryKeyConstraint("serial", name=op.f("pk_certificates")),
        comment="Every certificate that was issued",
    )
    op.create_index(
        op.f("ix_certificates_spki_sha256"), "certificates", ["spki_sha256"], unique=False
    )
    op.create_index(
        op.f("ix_certificates_subject_name"), "certificates", ["subject_name"], unique=False
    )
    op.create_table(
        "history",
        sa.Column(
            "id",
            sa.BigInteger(),
            autoincrement=False,
            nullable=False,
            comment="from 1, without gaps, in order of commit",
        ),
        sa.Column("at", sa.BigInteger(), nullable=False, comment="Unix ms UTC"),
        sa.Column(
            "run_id", sa.Text(), nullable=True, comment="of which run; NULL: about the federation"
        ),
        sa.Column(
            "number",
            sa.Integer(),
            nullable=True,
            comment="of which round; NULL: about the run or the federation",
        ),
        sa.Column(
            "transaction", sa.Text(), nullable=False, comment="name of the ledger transaction"
        ),
        sa.Column("phase", sa.Text(), nullable=False, comment="after the change, or ''"),
        sa.Column("why", sa.Text(), nullable=False, comment="one line"),
        sa.Column("node_id", sa.Text(), nullable=True, comment="who caused it; NULL: no node did"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_history")),
        comment="Every change of state, with its reason; rows are never changed or removed",
    )
    op.create_index(op.f("ix_history_run_id"), "history", ["run_id", "id"], unique=False)
    op.create_table(
        "leases",
        sa.Column("name", sa.Text(), nullable=False, comment="what is leased"),
        sa.Column("holder", sa.Text(), nullable=False, comment="a process"),
        sa.Column(
            "fence", sa.BigInteger(), nullable=False, comment="grows with each new holder, from 1"
        ),
        sa.Column("expires_at", sa.BigInteger(), nullable=False, comment="Unix ms UTC"),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_leases")),
        comment="Which process drives what",
    )
    op.create_table(
        "ledger_version",
        sa.Column("one", sa.Integer(), autoincrement=False, nullable=False, comment="always 1"),
        sa.Column(
            "value", sa.BigInteger(), nullable=False, comment="the last id in history; 0: none"
        ),
        sa.CheckConstraint("one = 1", name=op.f("ck_ledger_version_one")),
        sa.PrimaryKeyConstraint("one", name=op.f("pk_ledger_version")),
        comment="One row; its lock puts history in order of commit",
    )
    op.create_table(
        "nodes",
        sa.Column("node_id", sa.Text(), nullable=False, comment="the institution's id"),
        sa.Column(
            "signing_key",
            sa.LargeBinary(),
            nullable=False,
            comment="raw Ed25519 public key, 32 bytes",
        ),
        sa.Column("status", sa.Text(), nullable=False, comment="active | suspended"),
        sa.Column(
            "enrolled_at",
            sa.BigInteger(),
            nullable=False,
            comment="Unix ms UTC, of the first enrolment",
        ),
        sa.Column(
            "seen_at",
            sa.BigInteger(),
            nullable=True,
            comment="Unix ms UTC of its last sync; NULL: never",
        ),
        sa.Column(
            "state", sa.Text(), nullable=False, comment="running | paused | '' as it said last"
        ),
        sa.Column("agent_version", sa.Text(), nullable=False, comment="as it said last, or ''"),
        sa.CheckConstraint("status IN ('active', 'suspended')", name=op.f("ck_nodes_status")),
        sa.PrimaryKeyConstraint("node_id", name=op.f("pk_nodes")),
        comment="Enrolled institutions",
    )
    op.create_table(
        "runs",
        sa.Column("run_id", sa.Text(), nullable=False, comment="the run's name"),
        sa.Column("plan", sa.LargeBinary(), nullable=False, comment="canonical JSON"),
        sa.Column("plan_digest", sa.Text(), nullable=False, comment="hex"),
        sa.Column(
            "snapshot",
            sa.LargeBinary(),
            nullable=False,
            comment="canonical JSON: the initial model",
        ),
        sa.Column("status", sa.Text(), nullable=False, comment="active | done | stopped | failed"),
        sa.Column("why", sa.Text(), nullable=False, comment="one sentence on the status"),
        sa.Column("submitted_at", sa.BigInteger(), nullable=False, comment="Unix ms UTC"),
        sa.Column(
            "ended_at", sa.BigInteger(), nullable=True, comment="Unix ms UTC; NULL: still active"
        ),
        sa.CheckConstraint("(status = 'active') = (ended_at IS NULL)", name=op.f("ck_runs_ended")),
        sa.CheckConstraint(
            "status IN ('active', 'done', 'stopped', 'failed')", name=op.f("ck_runs_status")
        ),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_runs")),
        comment="Runs and the plans they execute",
    )
    op.create_table(
        "tokens",
        sa.Column(
            "token_hash", sa.LargeBinary(), nullable=False, comment="32 bytes; not the token itself"
        ),
        sa.Column("institution", sa.Text(), nullable=False, comment="whom it invites"),
        sa.Column("expires_at", sa.BigInteger(), nullable=False, comment="Unix ms UTC"),
        sa.Column(
            "used_at", sa.BigInteger(), nullable=True, comment="Unix ms UTC; NULL: not used yet"
        ),
        sa.Column(
            "request_hash",
            sa.LargeBinary(),
            nullable=True,
            comment="32 bytes, of the request that used it; NULL: not used yet",
        ),
        sa.PrimaryKeyConstraint("token_hash", name=op.f("pk_tokens")),
        comment="Invitations, each good for one certificate request",
    )
    op.create_table(
        "progress",
        sa.Column("node_id", sa.Text(), nullable=False, comment="who reports"),
        sa.Column(
            "reports", sa.LargeBinary(), nullable=False, comment="a SyncRequest with progress only"
        ),
        sa.Column("received_at", sa.BigInteger(), nullable=False, comment="Unix ms UTC"),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.node_id"], name=op.f("fk_progress_nodes")),
        sa.PrimaryKeyConstraint("node_id", name=op.f("pk_progress")),
        comment="What nodes say they are doing, a few seconds old; never part of a decision",
    )
    op.create_table(
        "rounds",
        sa.Column("run_id", sa.Text(), nullable=False, comment="of which run"),
        sa.Column(
            "number",
            sa.Integer(),
            autoincrement=False,
            nullable=False,
            comment="from 0; never used twice",
        ),
        sa.Column(
            "plan_index", sa.Integer(), nullable=False, comment="which of the plan's rounds, from 0"
        ),
        sa.Column("phase_name", sa.Text(), nullable=False, comment="of the phase, for queries"),
        sa.Column("phase", sa.Text(), nullable=False, comment="the phase, JSON"),
        sa.Column(
            "final", sa.Boolean(), nullable=False, comment="nothing can happen to it any more"
        ),
        sa.Column(
            "closes_at",
            sa.BigInteger(),
            nullable=True,
            comment="Unix ms UTC: when the clock alone moves it; NULL: never in this phase",
        ),
        sa.Column("why", sa.Text(), nullable=False, comment="of the last change, one line"),
        sa.Column("opened_at", sa.BigInteger(), nullable=False, comment="Unix ms UTC"),
        sa.Column(
            "changed_at", sa.BigInteger(), nullable=False, comment="Unix ms UTC of the last change"
        ),
        sa.Column("start_snapshot", sa.LargeBinary(), nullable=False, comment="canonical JSON"),
        sa.Column(
            "next_snapshot",
            sa.LargeBinary(),
            nullable=True,
            comment="canonical JSON; NULL: no sum was opened",
        ),
        sa.Column(
            "sum",
            sa.Text(),
            nullable=True,
            comment="hex digest of the sum's blob; NULL: no sum was opened",
        ),
        sa.Column(
            "metrics",
            sa.Text(),
            nullable=True,
            comment="JSON object name -> integer; NULL: no sum was opened",
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_rounds_runs")),
        sa.PrimaryKeyConstraint("run_id", "number", name=op.f("pk_rounds")),
        comment="Rounds, each with its phase",
    )
    op.create_index("ix_rounds_open", "rounds", ["final", "closes_at"], unique=False)
    op.create_table(
        "confirmations",
        sa.Column("run_id", sa.Text(), nullable=False, comment="of which run"),
        sa.Column(
            "number", sa.Integer(), autoincrement=False, nullable=False, comment="of which round"
        ),
        sa.Column("node_id", sa.Text(), nullable=False, comment="who says it"),
        sa.Column(
            "model_root",
            sa.Text(),
            nullable=False,
            comment="hex, as the node computed it; '': none",
        ),
        sa.Column("objection", sa.Text(), nullable=False, comment="a code; '': it agrees"),
        sa.Column(
            "detail",
            sa.Text(),
            nullable=False,
            comment="the node's sentence on its objection, or ''",
        ),
        sa.Column("received_at", sa.BigInteger(), nullable=False, comment="Unix ms UTC"),
        sa.ForeignKeyConstraint(
            ["node_id"], ["nodes.node_id"], name=op.f("fk_confirmations_nodes")
        ),
        sa.ForeignKeyConstraint(
            ["run_id", "number"],
            ["rounds.run_id", "rounds.number"],
            name=op.f("fk_confirmations_rounds"),
        ),
        sa.PrimaryKeyConstraint("run_id", "number", "node_id", name=op.f("pk_confirmations")),
        comment="What each node computed from a released sum, or why it objects",
    )
    op.create_table(
        "phase_times",
        sa.Column("run_id", sa.Text(), nullable=False, comment="of which run"),
        sa.Column(
            "number", sa.Integer(), autoincrement=False, nullable=False, comment="of which round"
        ),
        sa.Column(
            "history_id",
            sa.BigInteger(),
            autoincrement=False,
            nullable=False,
            comment="the history entry that brought the phase",
        ),
        sa.Column(
            "phase", sa.Text(), nullable=False, comment="name; a restarted Dealing is entered again"
        ),
        sa.Column("entered_at", sa.BigInteger(), nullable=False, comment="Unix ms UTC"),
        sa.ForeignKeyConstraint(
            ["run_id", "number"],
            ["rounds.run_id", "rounds.number"],
            name=op.f("fk_phase_times_rounds"),
        ),
        sa.PrimaryKeyConstraint("run_id", "number", "history_id", name=op.f("pk_phase_times")),
        comment="When each phase of each round began",
    )
    op.create_table(
        "traffic",
        sa.Column("run_id", sa.Text(), nullable=False, comment="of which run"),
        sa.Column(
            "number", sa.Integer(), autoincrement=False, nullable=False, comment="of which round"
        ),
        sa.Column("node_id", sa.Text(), nullable=False, comment="whose"),
        sa.Column(
            "bytes_up", sa.BigInteger(), nullable=False, comment="bytes of bulk data from the node"
        ),
        sa.Column(
            "bytes_down", sa.BigInteger(), nullable=False, comment="bytes of bulk data to the node"
        ),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.node_id"], name=op.f("fk_traffic_nodes")),
        sa.ForeignKeyConstraint(
            ["run_id", "number"], ["rounds.run_id", "rounds.number"], name=op.f("fk_traffic_rounds")
        ),
        sa.PrimaryKeyConstraint("run_id", "number", "node_id", name=op.f("pk_traffic")),
        comment="Bulk data moved, by node and round",
    )
    op.create_table(
        "uploads",
        sa.Column("upload_id", sa.LargeBinary(), nullable=False, comment="32 bytes"),
        sa.Column("run_id", sa.Text(), nullable=False, comment="of which run"),
        sa.Column("number", sa.Integer(), nullable=False, comment="of which round"),
        sa.Column("attempt", sa.Integer(), nullable=False, comment="from 1"),
        sa.Column("node_id", sa.Text(), nullable=False, comment="who sends"),
        sa.Column(
            "header", sa.LargeBinary(), nullable=False, comment="canonical JSON: what was signed"
        ),
        sa.Column(
            "signature",
            sa.LargeBinary(),
            nullable=False,
            comment="Ed25519 over the header, 64 bytes",
        ),
        sa.Column(
            "unit_hashes", sa.LargeBinary(), nullable=False, comment="32 bytes for each 4 MiB unit"
        ),
        sa.Column("total", sa.BigInteger(), nullable=False, comment="bytes"),
        sa.Column("began_at", sa.BigInteger(), nullable=False, comment="Unix ms UTC"),
        sa.Column(
            "finished_at", sa.BigInteger(), nullable=True, comment="Unix ms UTC; NULL: not complete"
        ),
        sa.Column(
            "receipt", sa.LargeBinary(), nullable=True, comment="32 bytes; NULL: not complete"
        ),
        sa.CheckConstraint(
            "(receipt IS NULL) = (finished_at IS NULL)", name=op.f("ck_uploads_finished")
        ),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.node_id"], name=op.f("fk_uploads_nodes")),
        sa.ForeignKeyConstraint(
            ["run_id", "number"], ["rounds.run_id", "rounds.number"], name=op.f("fk_uploads_rounds")
        ),
        sa.PrimaryKeyConstraint("upload_id", name=op.f("pk_uploads")),
        sa.UniqueConstraint(
            "run_id", "number", "attempt", "node_id", name=op.f("uq_uploads_run_id")
        ),
        comment="Vectors on their way in; their bytes lie in the spool",
    )
    op.execute("INSERT INTO ledger_version (one, value) VALUES (1, 0)")


def downgrade() -> None:
    """Remove every table."""
    op.drop_table("uploads")
    op.drop_table("traffic")
    op.drop_table("phase_times")
    op.drop_table("confirmations")
    op.drop_index("ix_rounds_open", table_name="rounds")
    op.drop_table("rounds")
    op.drop_table("progress")
    op.drop_table("tokens")
    op.drop_table("runs")
    op.drop_table("nodes")
    op.drop_table("ledger_version")
    op.drop_table("leases")
    op.drop_index(op.f("ix_history_run_id"), table_name="history")
    op.drop_table("history")
    op.drop_index(op.f("ix_certificates_subject_name"), table_name="certificates")
    op.drop_index(op.f("ix_certificates_spki_sha256"), table_name="certificates")
    op.drop_table("certificates")
