"""The ledger's tables.

Conventions: times are integers, Unix milliseconds UTC, and end in ``_at``; sizes are bytes; hashes
are raw 32 bytes in binary columns and 64 hexadecimal digits in text columns. Every column says its
unit, and what NULL means where it may be NULL. ``migrations/`` makes these tables; a test compares.

    nodes --< certificates            runs --< rounds --< uploads
      |                                          |-----< traffic, confirmations, phase_times
      '--- progress                   history (of everything), ledger_version, leases, tokens
                                      log_leaf, log_chain, log_size (the round log)
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

tokens = Table(
    "tokens",
    metadata,
    Column("token_hash", LargeBinary, primary_key=True, comment="32 bytes; not the token itself"),
    Column("institution", Text, nullable=False, comment="whom it invites"),
    Column("expires_at", BigInteger, nullable=False, comment="Unix ms UTC"),
    Column("used_at", BigInteger, comment="Unix ms UTC; NULL: not used yet"),
    Column(
        "request_hash",
        LargeBinary,
        comment="32 bytes, of the request that used it; NULL: not used yet",
    ),
    comment="Invitations, each good for one certificate request",
)

nodes = Table(
    "nodes",
    metadata,
    Column("node_id", Text, primary_key=True, comment="the institution's id"),
    Column("signing_key", LargeBinary, nullable=False, comment="raw Ed25519 public key, 32 bytes"),
    Column("status", Text, nullable=False, comment="active | suspended"),
    Column(
        "enrolled_at", BigInteger, nullable=False, comment="Unix ms UTC, of the first enrolment"
    ),
    Column("seen_at", BigInteger, comment="Unix ms UTC of its last sync; NULL: never"),
    Column("state", Text, nullable=False, comment="running | paused | '' as it said last"),
    Column("agent_version", Text, nullable=False, comment="as it said last, or ''"),
    Column(
        "approval",
        LargeBinary,
        comment="canonical JSON, signed by the institution; NULL: enrolled without governance",
    ),
    CheckConstraint("status IN ('active', 'suspended')", name="status"),
    comment="Enrolled institutions",
)

certificates = Table(
    "certificates",
    metadata,
    Column("serial", Text, primary_key=True, comment="hexadecimal"),
    Column("spki_sha256", Text, nullable=False, comment="hex SHA-256 of the public key info"),
    Column("subject_role", Text, nullable=False, comment="node | operator | coordinator"),
    Column("subject_name", Text, nullable=False, comment="node id or operator name"),
    Column("not_after", BigInteger, nullable=False, comment="Unix ms UTC"),
    Column("der", LargeBinary, nullable=False, comment="the certificate, DER"),
    Index(None, "spki_sha256"),
    Index(None, "subject_name"),
    comment="Every certificate that was issued",
)

runs = Table(
    "runs",
    metadata,
    Column("run_id", Text, primary_key=True, comment="the run's name"),
    Column("plan", LargeBinary, nullable=False, comment="canonical JSON"),
    Column("plan_digest", Text, nullable=False, comment="hex"),
    Column("snapshot", LargeBinary, nullable=False, comment="canonical JSON: the initial model"),
    Column(
        "request",
        LargeBinary,
        comment="JSON: the operator's signed request; NULL: it was not signed",
    ),
    Column("status", Text, nullable=False, comment="active | done | stopped | failed"),
    Column("why", Text, nullable=False, comment="one sentence on the status"),
    Column("submitted_at", BigInteger, nullable=False, comment="Unix ms UTC"),
    Column("ended_at", BigInteger, comment="Unix ms UTC; NULL: still active"),
    CheckConstraint("status IN ('active', 'done', 'stopped', 'failed')", name="status"),
    CheckConstraint("(status = 'active') = (ended_at IS NULL)", name="ended"),
    comment="Runs and the plans they execute",
)

rounds = Table(
    "rounds",
    metadata,
    Column("run_id", Text, ForeignKey("runs.run_id"), primary_key=True, comment="of which run"),
    Column(
        "number", Integer, primary_key=True, autoincrement=False, comment="from 0; never used twice"
    ),
    Column("plan_index", Integer, nullable=False, comment="which of the plan's rounds, from 0"),
    Column("phase_name", Text, nullable=False, comment="of the phase, for queries"),
    Column("phase", Text, nullable=False, comment="the phase, JSON"),
    Column("final", Boolean, nullable=False, comment="nothing can happen to it any more"),
    Column(
        "closes_at",
        BigInteger,
        comment="Unix ms UTC: when the clock alone moves it; NULL: never in this phase",
    ),
    Column("why", Text, nullable=False, comment="of the last change, one line"),
    Column("opened_at", BigInteger, nullable=False, comment="Unix ms UTC"),
    Column("changed_at", BigInteger, nullable=False, comment="Unix ms UTC of the last change"),
    Column("start_snapshot", LargeBinary, nullable=False, comment="canonical JSON"),
    Column("next_snapshot", LargeBinary, comment="canonical JSON; NULL: no sum was opened"),
    Column("sum", Text, comment="hex digest of the sum's blob; NULL: no sum was opened"),
    Column("metrics", Text, comment="JSON object name -> integer; NULL: no sum was opened"),
    Column(
        "transcript",
        Text,
        comment="hex digest of the blob that says how the sum was opened; NULL: no secure sum",
    ),
    Index("ix_rounds_open", "final", "closes_at"),
    comment="Rounds, each with its phase",
)

phase_times = Table(
    "phase_times",
    metadata,
    Column("run_id", Text, primary_key=True, comment="of which run"),
    Column("number", Integer, primary_key=True, autoincrement=False, comment="of which round"),
    Column(
        "history_id",
        BigInteger,
        primary_key=True,
        autoincrement=False,
        comment="the history entry that brought the phase",
    ),
    Column("phase", Text, nullable=False, comment="name; a restarted Dealing is entered again"),
    Column("entered_at", BigInteger, nullable=False, comment="Unix ms UTC"),
    ForeignKeyConstraint(["run_id", "number"], ["rounds.run_id", "rounds.number"]),
    comment="When each phase of each round began",
)

uploads = Table(
    "uploads",
    metadata,
    Column("upload_id", LargeBinary, primary_key=True, comment="32 bytes"),
    Column("run_id", Text, nullable=False, comment="of which run"),
    Column("number", Integer, nullable=False, comment="of which round"),
    Column("attempt", Integer, nullable=False, comment="from 1"),
    Column("node_id", Text, ForeignKey("nodes.node_id"), nullable=False, comment="who sends"),
    Column("header", LargeBinary, nullable=False, comment="canonical JSON: what was signed"),
    Column("signature", LargeBinary, nullable=False, comment="Ed25519 over the header, 64 bytes"),
    Column("unit_hashes", LargeBinary, nullable=False, comment="32 bytes for each 4 MiB unit"),
    Column("total", BigInteger, nullable=False, comment="bytes"),
    Column("began_at", BigInteger, nullable=False, comment="Unix ms UTC"),
    Column("finished_at", BigInteger, comment="Unix ms UTC; NULL: not complete"),
    Column("receipt", LargeBinary, comment="32 bytes; NULL: not complete"),
    UniqueConstraint("run_id", "number", "attempt", "node_id"),
    ForeignKeyConstraint(["run_id", "number"], ["rounds.run_id", "rounds.number"]),
    CheckConstraint("(receipt IS NULL) = (finished_at IS NULL)", name="finished"),
    comment="Vectors on their way in; their bytes lie in the spool",
)

secure_messages = Table(
    "secure_messages",
    metadata,
    Column("run_id", Text, primary_key=True, comment="of which run"),
    Column("number", Integer, primary_key=True, autoincrement=False, comment="of which round"),
    Column("attempt", Integer, primary_key=True, autoincrement=False, comment="from 1"),
    Column("kind", Text, primary_key=True, comment="of the message"),
    Column("node_id", Text, ForeignKey("nodes.node_id"), primary_key=True, comment="who signed it"),
    Column("body", LargeBinary, nullable=False, comment="canonical JSON, signed"),
    Column("received_at", BigInteger, nullable=False, comment="Unix ms UTC"),
    ForeignKeyConstraint(["run_id", "number"], ["rounds.run_id", "rounds.number"]),
    comment="Messages of secure sums as they came; the first of each kind stays",
)

privacy_claims = Table(
    "privacy_claims",
    metadata,
    Column("run_id", Text, ForeignKey("runs.run_id"), primary_key=True, comment="of which run"),
    Column(
        "claim",
        LargeBinary,
        nullable=False,
        comment="canonical JSON: what a training round costs each institution",
    ),
    comment="Runs in private modes and what their rounds cost",
)

privacy_spends = Table(
    "privacy_spends",
    metadata,
    Column("run_id", Text, primary_key=True, comment="of which run"),
    Column("number", Integer, primary_key=True, autoincrement=False, comment="of which round"),
    Column("node_id", Text, ForeignKey("nodes.node_id"), primary_key=True, comment="whose data"),
    Column("dataset", Text, nullable=False, comment="which of its data"),
    Column("claim", LargeBinary, nullable=False, comment="canonical JSON: what it costs"),
    Column("status", Text, nullable=False, comment="reserved | released | burned | void"),
    Column("reserved_at", BigInteger, nullable=False, comment="Unix ms UTC"),
    Column("settled_at", BigInteger, comment="Unix ms UTC; NULL: reserved"),
    ForeignKeyConstraint(["run_id", "number"], ["rounds.run_id", "rounds.number"]),
    CheckConstraint("status IN ('reserved', 'released', 'burned', 'void')", name="status"),
    CheckConstraint("(status = 'reserved') = (settled_at IS NULL)", name="settled"),
    Index("ix_privacy_spends_data", "node_id", "dataset"),
    comment="Privacy that institutions' data have spent; all but void counts",
)

traffic = Table(
    "traffic",
    metadata,
    Column("run_id", Text, primary_key=True, comment="of which run"),
    Column("number", Integer, primary_key=True, autoincrement=False, comment="of which round"),
    Column("node_id", Text, ForeignKey("nodes.node_id"), primary_key=True, comment="whose"),
    Column("bytes_up", BigInteger, nullable=False, comment="bytes of bulk data from the node"),
    Column("bytes_down", BigInteger, nullable=False, comment="bytes of bulk data to the node"),
    ForeignKeyConstraint(["run_id", "number"], ["rounds.run_id", "rounds.number"]),
    comment="Bulk data moved, by node and round",
)

confirmations = Table(
    "confirmations",
    metadata,
    Column("run_id", Text, primary_key=True, comment="of which run"),
    Column("number", Integer, primary_key=True, autoincrement=False, comment="of which round"),
    Column("node_id", Text, ForeignKey("nodes.node_id"), primary_key=True, comment="who says it"),
    Column("model_root", Text, nullable=False, comment="hex, as the node computed it; '': none"),
    Column("objection", Text, nullable=False, comment="a code; '': it agrees"),
    Column("detail", Text, nullable=False, comment="the node's sentence on its objection, or ''"),
    Column("received_at", BigInteger, nullable=False, comment="Unix ms UTC"),
    ForeignKeyConstraint(["run_id", "number"], ["rounds.run_id", "rounds.number"]),
    comment="What each node computed from a released sum, or why it objects",
)

costs = Table(
    "costs",
    metadata,
    Column("run_id", Text, primary_key=True, comment="of which run"),
    Column("number", Integer, primary_key=True, autoincrement=False, comment="of which round"),
    Column("node_id", Text, ForeignKey("nodes.node_id"), primary_key=True, comment="who says it"),
    Column("gpu_ms", BigInteger, nullable=False, comment="devices held, milliseconds"),
    Column("cpu_ms", BigInteger, nullable=False, comment="milliseconds"),
    Column("energy_mwh", BigInteger, nullable=False, comment="milliwatt hours"),
    Column("source", Text, nullable=False, comment="of the energy: measured|estimated|none"),
    Column("received_at", BigInteger, nullable=False, comment="Unix ms UTC"),
    ForeignKeyConstraint(["run_id", "number"], ["rounds.run_id", "rounds.number"]),
    comment="What a local step cost, as the node claims it",
)

history = Table(
    "history",
    metadata,
    Column(
        "id",
        BigInteger,
        primary_key=True,
        autoincrement=False,
        comment="from 1, without gaps, in order of commit",
    ),
    Column("at", BigInteger, nullable=False, comment="Unix ms UTC"),
    Column("run_id", Text, comment="of which run; NULL: about the federation"),
    Column("number", Integer, comment="of which round; NULL: about the run or the federation"),
    Column("transaction", Text, nullable=False, comment="name of the ledger transaction"),
    Column("phase", Text, nullable=False, comment="after the change, or ''"),
    Column("why", Text, nullable=False, comment="one line"),
    Column("node_id", Text, comment="who caused it; NULL: no node did"),
    Index(None, "run_id", "id"),
    comment="Every change of state, with its reason; rows are never changed or removed",
)

ledger_version = Table(
    "ledger_version",
    metadata,
    Column("one", Integer, primary_key=True, autoincrement=False, comment="always 1"),
    Column("value", BigInteger, nullable=False, comment="the last id in history; 0: none"),
    CheckConstraint("one = 1", name="one"),
    comment="One row; its lock puts history in order of commit",
)

leases = Table(
    "leases",
    metadata,
    Column("name", Text, primary_key=True, comment="what is leased"),
    Column("holder", Text, nullable=False, comment="a process"),
    Column("fence", BigInteger, nullable=False, comment="grows with each new holder, from 1"),
    Column("expires_at", BigInteger, nullable=False, comment="Unix ms UTC"),
    comment="Which process drives what",
)

progress = Table(
    "progress",
    metadata,
    Column("node_id", Text, ForeignKey("nodes.node_id"), primary_key=True, comment="who reports"),
    Column("reports", LargeBinary, nullable=False, comment="a SyncRequest with progress only"),
    Column("received_at", BigInteger, nullable=False, comment="Unix ms UTC"),
    comment="What nodes say they are doing, a few seconds old; never part of a decision",
)

log_leaf = Table(
    "log_leaf",
    metadata,
    Column(
        "index",
        BigInteger,
        primary_key=True,
        autoincrement=False,
        comment="from 0, without gaps, in order of commit",
    ),
    Column("leaf_hash", Text, nullable=False, unique=True, comment="hex, of the entry"),
    Column("root", Text, nullable=False, comment="hex, of the tree that ends with this leaf"),
    Column("entry", LargeBinary, nullable=False, comment="DSSE envelope, canonical JSON"),
    Column("kind", Text, nullable=False, comment="e.g. round.plan"),
    Column("signer", Text, nullable=False, comment="hex key id of who signed it"),
    Column("run_id", Text, comment="of which run; NULL: not about a round"),
    Column("number", Integer, comment="of which round; NULL: not about a round"),
    Column("attempt", Integer, comment="of which attempt; NULL: the kind has none"),
    Column("logged_at", BigInteger, nullable=False, comment="Unix ms UTC"),
    Index("ix_log_leaf_round", "run_id", "number", "kind"),
    comment="The round log; rows are never changed or removed, the files are made of them",
)

log_chain = Table(
    "log_chain",
    metadata,
    Column("signer", Text, primary_key=True, comment="hex key id"),
    Column("seq", BigInteger, nullable=False, comment="of its last leaf, from 1"),
    Column("leaf_hash", Text, nullable=False, comment="hex, of its last leaf"),
    comment="The head of each signer's chain of leaves",
)

log_size = Table(
    "log_size",
    metadata,
    Column("one", Integer, primary_key=True, autoincrement=False, comment="always 1"),
    Column("value", BigInteger, nullable=False, comment="leaves"),
    CheckConstraint("one = 1", name="one"),
    comment="One row; its lock gives leaves their index in order of commit",
)
