"""Which method of the coordinator is which action, and whether a caller may do it.

Every method has an action; one that has none is refused, so a method that somebody adds and forgets
here is closed. A test compares the table with the services. Membership itself is looked at where
the certificate is read; the rules see its answer as the institution's status.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from policies.cedar.engine import NO_PERMIT, RuleSet
from policies.decision import Decision, Refused, refused

OPEN: Final = (
    "open"  # callers without a certificate, who prove themselves by a token or a signature
)
UNKNOWN_METHOD: Final = "fed.unknown_method"
UNKNOWN_ROLE: Final = "fed.unknown_role"
_PACKAGE: Final = "/minga.v1."

_TAKE_PART = ("Sync", "Join", "Decline", "Ready", "Leave", "Confirm")
ACTIONS: Final[Mapping[str, str]] = {
    **{f"Rounds/{name}": "takePart" for name in _TAKE_PART},
    "Rounds/GetPlan": "readBlobs",  # also for people
    "SecureSum/Post": "takePart",
    "SecureSum/Get": "takePart",
    "Bulk/BeginUpload": "takePart",
    "Bulk/Append": "takePart",
    "Bulk/FinishUpload": "takePart",
    "Bulk/DescribeBlob": "readBlobs",
    "Bulk/Fetch": "readBlobs",
    "Bulk/BeginPut": "putBlobs",
    "Bulk/Put": "putBlobs",
    "Enrolment/Join": OPEN,
    "Enrolment/JoinPerson": OPEN,
    "Renewal/Renew": "renewCertificate",
    "Accounting/Report": "takePart",
    "Log/Follow": "readTrust",
    "Log/Prove": "readTrust",
    "Log/Submit": "takePart",
    "Log/Deliver": "publishTrust",
    "Witness/NextCheckpoint": "takePart",
    "Trust/File": "readTrust",
    "Trust/Approvals": "readTrust",
    "Trust/Publish": "publishTrust",
    "Admin/Invite": "manageMembers",
    "Admin/ListNodes": "watchRuns",
    "Admin/SubmitRun": "manageRuns",
    "Admin/StopRun": "manageRuns",
    "Admin/ListRuns": "watchRuns",
    "Admin/PlanRun": "manageRuns",
    "Admin/ShowRun": "watchRuns",
    "Admin/WatchRun": "watchRuns",
    "Admin/Why": "watchRuns",
}
# Roles of certificates and of the signed membership, as the schema writes them.
ROLES: Final[Mapping[str, str]] = {
    "admin": "admin", "auditor": "auditor", "operator": "operator", "partner": "partner",
    "release-board": "releaseBoard", "witness": "witness",
}  # fmt: skip


def action_of(method: str) -> str | None:
    """The action of ``/minga.v1.Service/Method``; None: the table does not know it."""
    if not method.startswith(_PACKAGE):
        return None
    return ACTIONS.get(method.removeprefix(_PACKAGE))


def decide_call(
    rules: RuleSet,
    method: str,
    *,
    role: str,
    name: str,
    roles: Iterable[str] = (),
    institution: str = "",
    country: str = "",
    status: str = "active",
    federation: str,
) -> Decision:
    """Whether a caller may call a method.

    Args:
        rules: the consortium's.
        method: full name, as gRPC has it.
        role: of the certificate: "node", or a person's.
        name: of the certificate: a node's institution, a person's handle.
        roles: further roles that the membership gives the person; separation of duties sees all.
        institution: of a person; a node's is its name.
        country: of the institution; empty: not known.
        status: of the institution in the membership.
        federation: its name.
    """
    action = action_of(method)
    if action is None or action == OPEN:
        return refused(UNKNOWN_METHOD, f"no rule says who may call {method:.80}")
    home = name if role == "node" else institution
    place = {"type": "Minga::Institution", "id": home}
    parents = [place]
    whole = {"uid": place, "attrs": {"country": country, "status": status}, "parents": []}
    if role == "node":
        kind, who = "NodeAgent", f"{name}/1"
        attrs: dict[str, Any] = {"spiffe": f"/inst/{name}/node/1"}
    else:
        mine = {role, *roles}
        if not mine <= ROLES.keys():
            return refused(UNKNOWN_ROLE, f"no rule knows the role {min(mine - ROLES.keys())}")
        kind, who = "Person", name
        refs = [{"__entity": {"type": "Minga::Role", "id": ROLES[item]}} for item in sorted(mine)]
        attrs = {"roles": refs, "assurance": 1}
    caller = {
        "uid": {"type": f"Minga::{kind}", "id": who},
        "attrs": {**attrs, "institution": {"__entity": place}},
        "parents": parents,
    }
    target = {"uid": {"type": "Minga::Federation", "id": federation}, "attrs": {}, "parents": []}
    request = {
        "principal": caller["uid"],
        "action": {"type": "Minga::Action", "id": action},
        "resource": target["uid"],
        "context": {},
    }
    decision = rules.decide(request, [whole, caller, target])
    if isinstance(decision, Refused) and decision.rules == (NO_PERMIT,):
        said = f"{role} {name} may not do this: no rule permits {action} to a {role}"
        return refused(NO_PERMIT, said)
    return decision
