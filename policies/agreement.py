"""A larger privacy budget needs the institution itself: it says so under its own key.

    inst/<id>/budget-<policy version>.json      published by role inst-<id>, before the policy

The document names the very policy, so its bytes follow from both and only the digest of the target
is compared. Nobody can agree for another: the role is signed by the institution's own keys alone.
An agreement that was published stays there, also after its role's time is over: whoever was away
reads the policies in between. Normative text: protocols/spec/governance.md, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from tuf.api.metadata import Targets

from policies.changes import describe_change
from policies.consortium import EVERYBODY, ConsortiumPolicy
from protocols.canonical import canonical_bytes
from protocols.governance import roles
from protocols.governance.documents import Members
from protocols.governance.errors import TrustRefusedError
from protocols.governance.repository import TrustState, parse_metadata, sha256_of
from protocols.identifiers import Digest

CONSENT_SCHEMA: Final = "minga.budget-consent/1"
STILL_MEMBERS: Final = ("active", "suspended")


def consent_path(institution: str, policy_version: int) -> str:
    """The target under which an institution agrees to a policy."""
    return f"inst/{institution}/budget-{policy_version}.json"


def consent_bytes(institution: str, policy: ConsortiumPolicy) -> bytes:
    """What it publishes there: canonical JSON."""
    return canonical_bytes(
        {
            "schema": CONSENT_SCHEMA,
            "federation": policy.federation,
            "institution": institution,
            "policy": {"version": policy.policy_version, "sha256": policy.digest},
        }
    )


def must_agree(
    old: ConsortiumPolicy | None, new: ConsortiumPolicy, members: Members
) -> tuple[str, ...]:
    """Institutions whose budget the new policy may raise, in order; of the first policy nobody.

    Whoever is suspended is asked too; who was expelled or left has no budget.
    """
    if old is None or old.digest == new.digest:
        return ()
    asked = set(describe_change(old, new).consents)
    return tuple(
        item.id
        for item in members.institutions
        if item.status in STILL_MEMBERS and asked & {item.id, EVERYBODY}
    )


def missing_agreements(
    old: ConsortiumPolicy | None, new: ConsortiumPolicy, state: TrustState
) -> tuple[str, ...]:
    """Those of ``must_agree`` that have not agreed to this very policy."""
    asked = must_agree(old, new, state.members)
    if not asked:
        return ()
    said = _published(state, asked)
    return tuple(
        name
        for name in asked
        if said.get(consent_path(name, new.policy_version)) != sha256_of(consent_bytes(name, new))
    )


def check_agreements(
    old: ConsortiumPolicy | None, new: ConsortiumPolicy, state: TrustState
) -> None:
    """Raises: TrustRefusedError: trust.consent: somebody has not agreed to its larger budget."""
    missing = missing_agreements(old, new, state)
    if missing:
        raise TrustRefusedError(
            f"policy {new.policy_version} may raise the privacy budget of {', '.join(missing)}: "
            "each must agree under its own key (`minga admin policy agree`)",
            rule="trust.consent",
        )


def _published(state: TrustState, institutions: Iterable[str]) -> Mapping[str, Digest]:
    """Targets of these institutions' own roles, by path; also where a role's time is over."""
    found: dict[str, Digest] = {}
    for name in institutions:
        role = roles.institution_role(name)
        data, signed = state.metadata.get(role), state.quorums.get(role)
        if data is None or signed is None or not signed.complete:
            continue
        for path, info in parse_metadata(data, Targets).signed.targets.items():
            found[path] = Digest(info.hashes.get("sha256", ""))
    return found
