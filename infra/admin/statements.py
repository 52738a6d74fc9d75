"""Leaves that an admin or an institution signs by hand, offline, over a mirrored log.

The log is replayed as everybody replays it: the new leaf is signed behind its signer's last one and
tried out at once, so that what the coordinator and the nodes would refuse is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from infra.audit.folder import read_log, read_trust_policy
from policies.audit.replay import LeafRefusedError, Replay
from policies.audit.tree import check_tree
from protocols.canonical import canonical_bytes, sha256_hex
from protocols.crypto.signatures import public_bytes
from protocols.errors import IntegrityError, MalformedMessageError
from protocols.identifiers import Digest
from protocols.tlog.kinds import PEOPLE, Predicate, read_predicate
from protocols.tlog.leaf import FIRST_PREV, Leaf, Seen, Statement, key_id_of, sign_leaf

# The field whose digest is what the leaf is about; without one, the fields themselves.
ABOUT: Final[Mapping[str, str]] = {
    "ballot": "proposal_sha256",
    "code.approved": "provenance_sha256",
    "dataset.declared": "declaration_sha256",
    "emergency.notice": "document_sha256",
    "eval.report": "model",
    "incident": "evidence_sha256",
    "audit.report": "report_sha256",
    "member.statement": "statement_sha256",
    "objection.resolved": "objection",
    "override.granted": "plan_sha256",
    "policy.proposed": "sha256",
    "release.approved": "model",
    "release.withdrawn": "model",
}


def read_statement(kind: str, fields: Mapping[str, Any]) -> Predicate:
    """What somebody wants to say.

    Raises:
        LeafRefusedError: log.people: this kind goes with an act and is not said by hand.
        MalformedMessageError: the fields are not those of the kind.
    """
    if kind not in PEOPLE:
        kinds = ", ".join(sorted(PEOPLE))
        raise LeafRefusedError(
            "log.people", f"{kind!r:.60} is not signed by hand; these are: {kinds}"
        )
    return read_predicate(kind, fields)


def replayed(folder: Path, *, policy: Path, now: datetime) -> tuple[Replay, Seen]:
    """A mirrored log, checked: its state, and the witnessed checkpoint it was read under.

    Raises:
        NotFoundError: no log there.
        IntegrityError: the first bad place of it.
    """
    files = read_log(folder)
    tree = check_tree(files, read_trust_policy(policy), now=int(now.timestamp()))
    for fault in tree.faults:
        raise IntegrityError(f"{folder}: {fault.reason}")
    log = Replay()
    for entry in files.entries:
        log.take(entry)
    return log, Seen(size=log.size, root=log.root)


def sign_statement(
    said: Predicate, key: Ed25519PrivateKey, *, log: Replay, seen: Seen, now: datetime
) -> Leaf:
    """The next leaf of this key.

    Raises:
        BadSignatureError: the key is not in force in this log.
        LeafRefusedError: it may not say this.
        MalformedMessageError: larger than a leaf may be, or an empty log.
    """
    if log.federation is None:
        raise MalformedMessageError("the log is empty")
    head = log.chains.get(key_id_of(public_bytes(key)))
    fields = said.to_fields()
    about = fields.get(ABOUT[said.KIND]) or sha256_hex(canonical_bytes(fields))
    statement = Statement(
        kind=said.KIND,
        subject=f"fed/{log.federation}/statement/{said.KIND}",
        digest=Digest(about),
        seq=head.seq + 1 if head else 1,
        prev=head.leaf if head else FIRST_PREV,
        seen=seen,
        time=now.replace(microsecond=0),
        fields=fields,
    )
    leaf = sign_leaf(statement, key)
    log.copy().take(leaf.entry)
    return leaf
