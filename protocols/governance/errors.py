"""Why something that claims to be signed by the federation is not taken."""

from __future__ import annotations

from protocols.errors import IntegrityError, PlanRefusedError


class TrustRefusedError(PlanRefusedError):
    """What was signed does not suffice for what it wants: a rule id and one sentence.

    trust.quorum       too few distinct keys, institutions or countries signed
    trust.majority     the change needs a higher majority than its role
    trust.alias        one key stands under two ids, or under an id that is not its own
    trust.institution  two keys of one institution where each counts once
    trust.duties       a person holds two roles that exclude each other
    trust.expired      a document or a role is past its time
    trust.rollback     an older version than the one that was accepted
    trust.shape        the repository is laid out otherwise than the specification says
    trust.plan         the plan is not among the signed terms
    trust.member       an institution is not an active member
    trust.emergency    an emergency notice forbids it
    trust.log          a file is not in the witnessed log, or the log has another one
    trust.key          a member's key is not the one that its institution signed for
    trust.bootstrap    the federation has not been founded: no root is signed yet
    """

    code = "trust_refused"


class ForgedError(IntegrityError):
    """A signature of the trust repository is not by whom it must be."""

    code = "trust_forged"
    advice = "Keep the files: they are evidence against whoever served them."
