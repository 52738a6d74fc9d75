"""What changed between two states of the trust repository, in words, and the majority it needs.

The kind of a change is computed from the documents, never taken from who proposes it. How many
must sign for a kind is the decision table of the policy in force; what nobody classified needs its
highest majority. A policy's own values are compared by ``policies.changes``.

| kind | recognised by |
|---|---|
| admit, suspend, reinstate, leave, keys | the member's entry in members.json |
| expel, readmit | its status becomes, or was, expelled |
| policy, code, budget | policy/*: see policies.changes |
| plan | plans/* |
| admins | the holders of the root's keys; admins.json |
| amendment | governance/*, thresholds, the governance section of the policy |
| unclassified | anything else |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from tuf.api.metadata import Targets

from policies import changes as changes_of_policy
from policies.consortium import ConsortiumPolicy, Decisions
from policies.decision import Refused
from policies.effect import POLICY_DOCUMENT
from policies.overrides import OVERRIDE_PREFIX, Override, check_override_terms
from protocols.governance import roles
from protocols.governance.documents import ADMINS, MEMBERS, Admins, Emergency, Institution, Members
from protocols.governance.errors import TrustRefusedError
from protocols.governance.repository import (
    Target,
    TrustState,
    parse_metadata,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing that changes."""

    kind: str
    role: str  # whose metadata file must carry the majority
    words: str  # one sentence
    exactly: int | None = None  # as computed elsewhere

    def count(self, table: Decisions) -> int:
        """Distinct institutions that must sign, by the decision table."""
        if self.exactly is not None:
            return self.exactly
        match self.kind:
            case "renew" | "plan" | "release" | "institution" | "emergency":
                return 0  # the role's own threshold
            case "admit" | "reinstate" | "leave" | "keys":
                return table.admit
            case "suspend":
                return table.suspend
            case "expel" | "readmit":
                return table.expel
            case "policy" | "code":
                return table.policy
            case "budget":
                return table.budget_increase  # and whom it concerns: ``policies.agreement``
            case "admins":
                return table.root
            case "amendment":
                return table.amendment
            case _:
                return table.highest


def compare(before: TrustState | None, after: TrustState) -> list[Change]:
    """Everything that differs between two verified states."""
    targets = before.targets if before else {}
    documents = before.documents if before else {}
    changes = list(who_decides(before, after))
    changes += compare_documents(targets, documents, after.targets, after.documents)
    for role, version in sorted(after.versions.items()):
        touched = before is None or before.versions.get(role, 0) < version
        if touched and role not in roles.ONLINE and all(change.role != role for change in changes):
            until = after.expires[role]
            changes.append(
                Change(kind="renew", role=role, words=f"signs {role} again, until {until:%F}")
                if role in roles.ADMIN_ROLES
                else Change(
                    kind="institution", role=role, words=f"signs {role} again, until {until:%F}"
                )
            )
    return changes


def who_decides(before: TrustState | None, after: TrustState) -> Iterator[Change]:
    """What changes of admins, thresholds, board and online key."""
    old = before.charter if before else None
    new = after.charter
    if old is None:
        terms = new.terms
        yield Change(
            kind="admins",
            role=roles.ROOT,
            words=f"founds federation {new.federation}: {terms.threshold} of {terms.admins} admins "
            f"decide, from {terms.min_countries} countries or more",
        )
        return
    for keyid in sorted(new.holders.keys() - old.holders.keys()):
        yield Change(
            kind="admins",
            role=roles.ROOT,
            words=f"gives {new.holders[keyid]} the admin key {keyid[:12]}…",
        )
    for keyid in sorted(old.holders.keys() - new.holders.keys()):
        yield Change(
            kind="admins",
            role=roles.ROOT,
            words=f"takes the admin key {keyid[:12]}… from {old.holders[keyid]}",
        )
    if old.terms != new.terms:
        yield Change(
            kind="amendment",
            role=roles.ROOT,
            words=f"changes who decides from {old.terms.threshold} of {old.terms.admins} admins "
            f"({old.terms.min_countries} countries) to {new.terms.threshold} of "
            f"{new.terms.admins} ({new.terms.min_countries})",
        )
    if before is not None and _board(before) != _board(after):
        yield Change(
            kind="amendment", role=roles.TARGETS, words="changes who signs the release of models"
        )
    if old.online != new.online:
        yield Change(
            kind="admins",
            role=roles.ROOT,
            words=f"gives the coordinator another online key, {new.online[:12]}…",
        )


def _board(state: TrustState) -> tuple[bool, tuple[str, ...], int]:
    """Whether the board is the admins; else whose keys, and how many sign."""
    targets = parse_metadata(state.metadata[roles.TARGETS], Targets).signed
    role = targets.get_delegated_role(roles.RELEASE)
    if set(role.keyids) == set(state.charter.holders):
        return True, (), 0
    return False, tuple(sorted(role.keyids)), role.threshold


def compare_documents(
    old_targets: Mapping[str, Target],
    old_documents: Mapping[str, bytes],
    new_targets: Mapping[str, Target],
    new_documents: Mapping[str, bytes],
) -> list[Change]:
    """What differs between two sets of published documents, by path."""
    changes: list[Change] = []
    for path in sorted(old_targets.keys() | new_targets.keys()):
        old, new = old_targets.get(path), new_targets.get(path)
        if old is not None and new is not None and old.sha256 == new.sha256:
            continue
        changes += _compare_target(
            path,
            (new or old or _never()).role,
            old_documents.get(path) if old else None,
            new_documents.get(path) if new else None,
            gone=new is None,
            fresh=old is None,
        )
        if path.startswith(OVERRIDE_PREFIX):
            changes.append(_override(path, new_documents, gone=new is None))
    return changes


def _override(path: str, documents: Mapping[str, bytes], *, gone: bool) -> Change:
    """An exception from a rule. One that could never count is not published at all.

    Raises:
        TrustRefusedError: with the rule of ``policies.overrides``.
        MalformedMessageError: it cannot be read.
    """
    if gone:
        return Change(kind="renew", role=roles.POLICY, words=f"withdraws the override {path}")
    override = Override.from_bytes(documents[path])
    policy = ConsortiumPolicy.from_bytes(documents.get(POLICY_DOCUMENT, b""))
    answer = check_override_terms(override, policy)
    if isinstance(answer, Refused):
        raise TrustRefusedError(answer.first.reason, rule=answer.first.rule)
    return Change(
        kind="override",
        role=roles.POLICY,
        words=f"lets plan {override.plan[:12]}… past {override.rule} ({override.code}) until "
        f"{override.expires}",
        exactly=policy.governance.override.threshold,
    )


def _never() -> Target:
    raise AssertionError("a path of neither set")


def _compare_target(
    path: str, role: str, old: bytes | None, new: bytes | None, *, gone: bool, fresh: bool
) -> list[Change]:
    if path.startswith(OVERRIDE_PREFIX):
        return []  # ``_override`` reads it together with the policy
    verb = "withdraws" if gone else "publishes" if fresh else "replaces"
    if path == MEMBERS and new is not None:
        before = Members.from_bytes(old) if old is not None else None
        return list(_members(before, Members.from_bytes(new)))
    if path == ADMINS and new is not None:
        before_admins = Admins.from_bytes(old) if old is not None else None
        return list(_admins(before_admins, Admins.from_bytes(new)))
    if path == POLICY_DOCUMENT and new is not None:
        return _policies(old, new)
    if role == roles.EMERGENCY:
        return [Change(kind="emergency", role=role, words=_emergency(path, old, new))]
    if role == roles.PLANS:
        return [Change(kind="plan", role=role, words=f"{verb} the plan {path}")]
    if role == roles.RELEASE:
        return [Change(kind="release", role=role, words=f"{verb} {path}")]
    if roles.institution_of(role) is not None:
        return [Change(kind="institution", role=role, words=f"{verb} {path}")]
    if path.startswith("policy/") and path.endswith(".cedar") and not gone:
        return [Change(kind="policy", role=role, words=f"{verb} the rules {path}")]
    if path.startswith("governance/"):
        return [Change(kind="amendment", role=role, words=f"{verb} the text {path}")]
    return [Change(kind="unclassified", role=role, words=f"{verb} {path}")]


def _policies(old: bytes | None, new: bytes) -> list[Change]:
    before = ConsortiumPolicy.from_bytes(old) if old is not None else None
    found = changes_of_policy.describe_change(before, ConsortiumPolicy.from_bytes(new))
    return [
        Change(
            kind=_KINDS[edit.kind],
            role=roles.POLICY,
            words=edit.sentence,
            exactly=found.signatures if before is None else None,
        )
        for edit in found.edits
    ]


_KINDS: Final[Mapping[changes_of_policy.Kind, str]] = {
    changes_of_policy.Kind.ROUTINE: "renew",
    changes_of_policy.Kind.POLICY: "policy",
    changes_of_policy.Kind.CODE: "code",
    changes_of_policy.Kind.BUDGET_INCREASE: "budget",
    changes_of_policy.Kind.AMENDMENT: "amendment",
    changes_of_policy.Kind.UNCLASSIFIED: "unclassified",
}


def _emergency(path: str, old: bytes | None, new: bytes | None) -> str:
    if new is None:
        return f"withdraws the emergency notice {path}"
    notice = Emergency.from_bytes(new)
    deny = notice.deny
    what = [f"institution {item}" for item in deny.institutions]
    what += [f"run {item}" for item in deny.runs]
    what += [f"plan {item[:12]}…" for item in deny.plans]
    what += [f"code {item[:12]}…" for item in deny.code]
    what += [f"certificate {item[:12]}…" for item in deny.certificates]
    if deny.all_rounds:
        what.append("every round")
    return f"denies {', '.join(what)} until {notice.until} ({notice.code})"


# -- members -------------------------------------------------------------------------------------

_STATUS_KINDS: Final[dict[tuple[str, str], tuple[str, str]]] = {
    ("active", "suspended"): ("suspend", "suspends {0}"),
    ("suspended", "active"): ("reinstate", "lets {0} back in"),
    ("active", "left"): ("leave", "records that {0} left"),
    ("suspended", "left"): ("leave", "records that {0} left"),
    ("left", "active"): ("admit", "admits {0} again"),
    ("active", "expelled"): ("expel", "expels {0}"),
    ("suspended", "expelled"): ("expel", "expels {0}"),
    ("expelled", "active"): ("readmit", "admits {0} again after its expulsion"),
}


def _members(old: Members | None, new: Members) -> Iterator[Change]:
    role = roles.MEMBERSHIP
    known = {item.id: item for item in old.institutions} if old else {}
    for name in sorted(known.keys() - {item.id for item in new.institutions}):
        yield Change(
            kind="unclassified", role=role, words=f"removes {name} from the list of members"
        )
    for item in new.institutions:
        before = known.get(item.id)
        if before is None:
            kind = "admit" if item.status == "active" else "unclassified"
            yield Change(
                kind=kind,
                role=role,
                words=f"admits {item.id} ({item.country}) as {' and '.join(item.roles)}, "
                f"with {len(item.keys)} institution key(s)",
            )
        else:
            yield from _member(before, item)


def _member(old: Institution, new: Institution) -> Iterator[Change]:
    role = roles.MEMBERSHIP
    if old.status != new.status:
        kind, words = _STATUS_KINDS.get(
            (old.status, new.status),
            ("unclassified", f"turns {{0}} from {old.status} to {new.status}"),
        )
        yield Change(kind=kind, role=role, words=words.format(new.id))
    if old.keys != new.keys:
        yield Change(
            kind="keys", role=role, words=f"changes the keys that speak for {new.id}: "
            f"{', '.join(key[:12] + '…' for key in new.keys)}",
        )  # fmt: skip
    if (old.nodes, old.witnesses, old.roles) != (new.nodes, new.witnesses, new.roles):
        yield Change(
            kind="keys",
            role=role,
            words=f"{new.id} is now {' and '.join(new.roles)}, with {len(new.nodes)} node(s) and "
            f"{len(new.witnesses)} witness(es)",
        )
    back = old.status in ("left", "expelled") and new.status == "active"  # since another day
    if old.country != new.country or (old.since != new.since and not back):
        yield Change(
            kind="unclassified", role=role, words=f"changes the country or date of {new.id}"
        )


def _admins(old: Admins | None, new: Admins) -> Iterator[Change]:
    role = roles.MEMBERSHIP
    known = {person.id: person for person in old.people} if old else {}
    for name in sorted(known.keys() - {person.id for person in new.people}):
        yield Change(kind="admins", role=role, words=f"ends the office of {name}")
    for person in new.people:
        before = known.get(person.id)
        office = " and ".join(person.roles)
        if before is None:
            words = (
                f"makes {person.id} ({person.institution}) {office} until {person.term_until[:10]}"
            )
            yield Change(kind="admins", role=role, words=words)
        elif before != person:
            words = f"changes the office, key or term of {person.id}: {office}"
            yield Change(kind="admins", role=role, words=words)
    if old is not None and (old.threshold, old.min_countries) != (new.threshold, new.min_countries):
        yield Change(
            kind="amendment",
            role=role,
            words=f"changes the threshold from {old.threshold} to {new.threshold}",
        )
