"""Emergencies, releases and expulsions: what the policy asks of those who decide them.

trust.emergency   fewer admins than the policy asks for, or a notice that lasts longer than it may
trust.board       a board of other size or threshold than the policy's, or only of admins; a model
                  that no member of the board signed who is not an admin
trust.release     a released model without the evaluations that the policy's gates ask for
trust.hearing     an expulsion before the member was heard

Asked where something is published, at every node, and by auditors: with the policy in force.
Normative text: protocols/spec/governance.md, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Final

from tuf.api.metadata import Targets

from policies.consortium import ConsortiumPolicy
from protocols.governance import roles
from protocols.governance.documents import Members, parse_time
from protocols.governance.errors import TrustRefusedError
from protocols.governance.keys import holder_of
from protocols.governance.repository import TrustState, parse_metadata

HEARING_HOURS: Final = 72  # for a member that was called to be heard, until silence is an answer
HEARING: Final = "hearing"  # topic of a member's statement; class of an admin's call to it
# An institution and a time: whether the log shows that it was heard by then.
Heard = Callable[[str, datetime], bool]


def touched(before: TrustState | None, after: TrustState, role: str) -> bool:
    """Whether a role has another file than before."""
    old = before.versions.get(role, 0) if before is not None else 0
    return after.versions.get(role, 0) > old


def check_bodies(before: TrustState | None, after: TrustState, in_force: ConsortiumPolicy) -> None:
    """Check what emergency role and release board have published since ``before``.

    Raises:
        TrustRefusedError: trust.emergency, trust.board.
    """
    if touched(before, after, roles.EMERGENCY):
        _check_emergency(before, after, in_force)
    if touched(before, after, roles.RELEASE) and after.metadata.get(roles.RELEASE) is not None:
        _check_release(after, in_force)
    if touched(before, after, roles.TARGETS):
        _check_board(after, in_force)


def _check_emergency(
    before: TrustState | None, after: TrustState, in_force: ConsortiumPolicy
) -> None:
    rule = in_force.governance.emergency
    signed = after.quorums[roles.EMERGENCY]
    if signed.counted < rule.threshold:
        raise TrustRefusedError(
            f"the emergency is signed by {signed.counted} admins, {rule.threshold} must",
            rule="trust.emergency",
        )
    known = before.emergencies if before is not None else {}
    for path, notice in after.emergencies.items():
        lasts = parse_time(notice.until) - parse_time(notice.issued_at)
        if known.get(path) != notice and lasts > timedelta(hours=rule.ttl_hours):
            raise TrustRefusedError(
                f"{path} lasts longer than the {rule.ttl_hours} hours that the policy allows",
                rule="trust.emergency",
            )


def _check_board(after: TrustState, in_force: ConsortiumPolicy) -> None:
    """A board that was delegated is the policy's: its size, its threshold, and not only admins."""
    targets = parse_metadata(after.metadata[roles.TARGETS], Targets).signed
    role, wanted = targets.get_delegated_role(roles.RELEASE), in_force.governance.release_board
    admins = set(after.charter.holders)
    if set(role.keyids) == admins:
        return  # there is no board yet: nothing is released
    if (len(role.keyids), role.threshold) != (wanted.n, wanted.threshold):
        raise TrustRefusedError(
            f"{role.threshold} of {len(role.keyids)} sign a release; the policy asks for "
            f"{wanted.threshold} of {wanted.n}",
            rule="trust.board",
        )
    people = {holder.person for holder in after.charter.holders.values()}
    others = {holder_of(targets.get_key(keyid)).person for keyid in role.keyids} - people
    if not others or not set(role.keyids) - admins:
        raise TrustRefusedError("everybody on the release board is an admin", rule="trust.board")


def _check_release(after: TrustState, in_force: ConsortiumPolicy) -> None:
    """A majority of the board signed, and one of them is not an admin."""
    need, signed = in_force.governance.release_board.threshold, after.quorums[roles.RELEASE]
    if len(signed.signed) < need:
        raise TrustRefusedError(
            f"the release is signed by {len(signed.signed)}, {need} of the board must",
            rule="trust.board",
        )
    admins = {holder.person for holder in after.charter.holders.values()}
    if all(holder.person in admins for holder in signed.signed):
        raise TrustRefusedError(
            "only admins signed the release; at least one must be no admin", rule="trust.board"
        )


# -- expulsions ------------------------------------------------------------------------------------


def expelled_between(before: Members | None, after: Members) -> tuple[str, ...]:
    """Members that are expelled now and were not before, in order."""
    known = {item.id: item.status for item in before.institutions} if before is not None else {}
    return tuple(
        item.id
        for item in after.institutions
        if item.status == "expelled" and known.get(item.id, "expelled") != "expelled"
    )


def check_hearings(before: Members | None, after: Members, heard: Heard, at: datetime) -> None:
    """Nobody is expelled unheard: suspension may come at once, expulsion after the hearing.

    Args:
        heard: what the log shows.
        at: when the list was published, UTC.

    Raises:
        TrustRefusedError: trust.hearing.
    """
    for name in expelled_between(before, after):
        if not heard(name, at):
            raise TrustRefusedError(
                f"{name} was not heard: the log has no statement of its own on its hearing, and "
                f"no admin called it {HEARING_HOURS} hours before",
                rule="trust.hearing",
            )


def heard_by(
    said: Mapping[str, datetime], called: Mapping[str, datetime], name: str, at: datetime
) -> bool:
    """Whether a member was heard by a time.

    Args:
        said: members that made a statement on their hearing, under their own keys, and when.
        called: members that an admin called to be heard, and when: silence is an answer, later.
    """
    if name in said and said[name] <= at:
        return True
    return name in called and called[name] + timedelta(hours=HEARING_HOURS) <= at
