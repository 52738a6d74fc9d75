"""The ledger: what the coordinator knows, in SQLite or PostgreSQL.

Services and drivers meet only here. Every change of state is one named transaction that leaves its
reason in history.
"""

from coordinator.ledger.leases import LeaseLostError
from coordinator.ledger.ledger import Ledger
from coordinator.ledger.log import LeafRow
from coordinator.ledger.rows import (
    CertificateRow,
    ConfirmationRow,
    HistoryRow,
    NodeRow,
    NodeStatus,
    PhaseTimeRow,
    ProgressRow,
    RoundRow,
    RunRow,
    RunStatus,
    TrafficRow,
    UploadRow,
    model_root_of,
)
from coordinator.ledger.sequencer import OwnLeaf, Sequencer
from coordinator.ledger.tx import Tx

__all__ = [
    "CertificateRow",
    "ConfirmationRow",
    "HistoryRow",
    "LeafRow",
    "LeaseLostError",
    "Ledger",
    "NodeRow",
    "NodeStatus",
    "OwnLeaf",
    "PhaseTimeRow",
    "ProgressRow",
    "RoundRow",
    "RunRow",
    "RunStatus",
    "Sequencer",
    "TrafficRow",
    "Tx",
    "UploadRow",
    "model_root_of",
]
