"""Terms of office: a signature counts while its admin holds the office.

Metadata does not say when it was signed, so a term is asked about where the time is known: by the
admin's own command before signing, and by the coordinator at publishing. What was published in
time stays in force for its readers, also after the term of a signer has ended; an auditor knows the
time of a publication from its leaf.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime

from protocols.governance import roles
from protocols.governance.documents import Admins, Person
from protocols.governance.errors import TrustRefusedError
from protocols.governance.people import in_term
from protocols.governance.repository import TrustState

_ROLES = (*roles.ADMIN_ROLES, roles.EMERGENCY)


def _offices(lists: Iterable[Admins], person: str) -> list[Person]:
    return [item for admins in lists for item in admins.admins() if item.id == person]


def out_of_office(lists: Iterable[Admins], person: str, now: datetime) -> str | None:
    """Why a signature by an admin does not count now; None: it does.

    Args:
        lists: the signed lists of people that may name the office: the one in force, and the one
            that a publication brings.
        person: handle.
        now: UTC.
    """
    held = _offices(lists, person)
    if any(in_term(item, now) for item in held):
        return None
    if not held:
        return f"{person} holds no office of an admin"
    return f"the term of {person} is from {held[-1].term_from} to {held[-1].term_until}"


def count_in_office(before: TrustState | None, after: TrustState, now: datetime) -> TrustState:
    """The new state with the signatures of those who hold the office at ``now``, and no others.

    Only roles with a new version are looked at: what was published before was asked then.

    Raises:
        TrustRefusedError: trust.quorum, with whose term is over, if too few are left.
    """
    lists = [after.admins] if before is None else [before.admins, after.admins]
    quorums = dict(after.quorums)
    for role in _ROLES:
        quorum = quorums.get(role)
        known = before.versions.get(role, 0) if before is not None else 0
        if quorum is None or after.versions.get(role, 0) <= known:
            continue
        out = {
            holder: why
            for holder in quorum.signed
            if (why := out_of_office(lists, holder.person, now)) is not None
        }
        holders = after.charter.holders
        counted = replace(
            quorum,
            signed=tuple(holder for holder in quorum.signed if holder not in out),
            keys=tuple(key for key in quorum.keys if holders.get(key) not in out),
        )
        if out and counted.missing is not None:
            raise TrustRefusedError(
                f"{counted.missing}: {'; '.join(out.values())}", rule="trust.quorum"
            )
        quorums[role] = counted
    return replace(after, quorums=quorums)
