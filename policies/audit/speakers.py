"""Whose keys may sign leaves, as the signed documents say: admins and institutions.

Nodes and the coordinator's sequencer read the log without the documents beside it. So the
``tuf.published`` leaf of a timestamp carries these keys (``speakers``), everybody's replay brings
them into force at that very leaf, and an auditor compares them with the documents (``signed``).
Normative text: protocols/spec/log.md, section 12.
"""

from __future__ import annotations

from typing import Final

from tuf.api.metadata import Root

from protocols.governance import roles
from protocols.governance.repository import TrustState, parse_metadata
from protocols.tlog.fields import Role
from protocols.tlog.kinds_general import MAX_SPEAKERS, Speakers

STATUSES: Final = ("active", "suspended")  # a suspended member may still answer


def speakers_of(state: TrustState) -> Speakers:
    """Ed25519 keys of the admins of the root and of the institutions, in that order, at most
    ``MAX_SPEAKERS``; a key that stands for two counts as the first."""
    root = parse_metadata(state.metadata[roles.ROOT], Root).signed
    found: dict[str, tuple[Role, str]] = {}
    for keyid, holder in sorted(state.charter.holders.items(), key=lambda item: item[1]):
        key = root.keys[keyid]
        if key.keytype == "ed25519":
            found.setdefault(str(key.keyval["public"]), (Role.ADMIN, holder.person))
    for member in state.members.institutions:
        for public in member.keys if member.status in STATUSES else ():
            found.setdefault(public, (Role.INSTITUTION, member.id))
    listed: dict[Role, dict[str, list[str]]] = {Role.ADMIN: {}, Role.INSTITUTION: {}}
    for public, (role, name) in list(found.items())[:MAX_SPEAKERS]:
        listed[role].setdefault(name, []).append(public)
    return Speakers(
        admin={name: tuple(sorted(keys)) for name, keys in listed[Role.ADMIN].items()},
        institution={name: tuple(sorted(keys)) for name, keys in listed[Role.INSTITUTION].items()},
    )
