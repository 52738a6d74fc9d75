"""Whether the institution of a node said that the keys of a request are its node's.

``enrol.request`` carries the institution's signature over the statement of enrolment.md, section 5;
the statement itself follows from the leaf's own fields. Every reader of the log checks it by the
keys that the log names for the institution at that index, an auditor by the signed membership.
"""

from __future__ import annotations

from collections.abc import Sequence

from protocols.errors import FederationError
from protocols.governance.approval import Approval, Statement, check_approval
from protocols.identifiers import FederationId, NodeId
from protocols.tlog.kinds_general import EnrolApproval, EnrolRequest


def approval_of(data: bytes) -> EnrolApproval:
    """What a leaf carries of an approval. Raises: MalformedMessageError."""
    approval = Approval.from_bytes(data)
    return EnrolApproval(
        key=approval.key,
        approved_at=approval.statement.approved_at,
        signature=approval.signature,
    )


def approval_in(said: EnrolRequest, federation: FederationId) -> bytes | None:
    """The approval that a leaf carries, as its institution signed it; None: it carries none.

    Raises:
        MalformedMessageError: no statement follows from the leaf.
    """
    if said.approval is None:
        return None
    value = {
        "key": said.approval.key,
        "signature": said.approval.signature,
        "statement": {
            "schema": "minga.enrol-approval/1",
            "federation": federation,
            "institution": said.institution,
            "node": "1",
            "signing_key": said.signing_key,
            "csr_sha256": said.csr_sha256,
            "spki_sha256": said.spki_sha256,
            "approved_at": said.approval.approved_at,
        },
    }
    Statement.from_value(value["statement"])
    return Approval.from_value(value).to_bytes()


def refusal(said: EnrolRequest, federation: FederationId, keys: Sequence[bytes]) -> str | None:
    """Why a request has not the word of its institution; None: it has.

    Args:
        said: the request.
        federation: whose log it stands in.
        keys: of the institution, 32 raw bytes each.
    """
    try:
        data = approval_in(said, federation)
        if data is None:
            return "it carries no approval of the institution"
        check_approval(data, federation=federation, institution=NodeId(said.node), keys=keys)
    except FederationError as error:
        return str(error)
    return None


__all__ = ["approval_in", "approval_of", "refusal"]
