"""What changed between two states, in words, and the majority that it needs.

The kind of a change is computed from the documents, never taken from who proposes it. The decision
table is written for nine admins and scaled to as many as there are, rounded up; it never asks for
less than the root's threshold. What the table does not name needs its highest majority.

| change | of nine | how it is recognised |
|---|---|---|
| admit, suspend, let back in, leave, keys of a member | 5 | the member's entry in members.json |
| expel, readmit | 6 | its status becomes, or was, expelled |
| policy, code, plan | 5 | policy/* except the rows below; plans/* |
| raise a privacy budget | 6 | a number or an entry under /privacy/budgets that grows |
| who decides: root, admins.json | 5 | under the old and the new root |
| governance text, thresholds, delays | 7 | governance/*, and /governance of the policy |
| anything else | 7 | |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from protocols.canonical import parse_json
from protocols.errors import MalformedMessageError
from protocols.governance import roles
from protocols.governance.documents import ADMINS, MEMBERS, Admins, Emergency, Institution, Members
from protocols.governance.repository import Target, TrustState

POLICY_DOCUMENT: Final = "policy/consortium.json"
HIGHEST: Final = 7
OF_NINE: Final[dict[str, int]] = {
    "renew": 5,
    "admit": 5,
    "suspend": 5,
    "reinstate": 5,
    "leave": 5,
    "keys": 5,
    "expel": 6,
    "readmit": 6,
    "policy": 5,
    "code": 5,
    "plan": 5,
    "budget": 6,
    "admins": 5,
    "amendment": HIGHEST,
    "unclassified": HIGHEST,
    "emergency": 0,  # any two: the role's own threshold
    "release": 0,  # the release board's threshold
    "institution": 0,  # its own keys
}
_NEUTRAL: Final = frozenset({"policy_version", "valid_from", "expires"})
_POLICY_SECTIONS: Final = frozenset(
    {
        "log", "participation", "rounds", "secagg", "privacy", "updates", "models", "data",
        "jurisdictions", "resources", "gates", "evaluators", "retention", "audit", "code",
    }
)  # fmt: skip
_MISSING: Final = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing that changes."""

    kind: str  # a key of OF_NINE
    role: str  # whose metadata file must carry the majority
    words: str  # one sentence

    def needs(self, terms: roles.Terms) -> int:
        """Distinct institutions; 0: the role's own threshold."""
        of_nine = OF_NINE[self.kind]
        return terms.at_least(of_nine) if of_nine else 0


def majorities(changes: list[Change], terms: roles.Terms) -> dict[str, int]:
    """The number of institutions that each role's metadata file needs, by what it changes."""
    found: dict[str, int] = {}
    for change in changes:
        found[change.role] = max(found.get(change.role, 0), change.needs(terms))
    return found


def compare(before: TrustState | None, after: TrustState) -> list[Change]:
    """Everything that differs between two verified states."""
    targets = before.targets if before else {}
    documents = before.documents if before else {}
    changes = list(_who_decides(before, after))
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


def _who_decides(before: TrustState | None, after: TrustState) -> Iterator[Change]:
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
    if old.online != new.online:
        yield Change(
            kind="admins",
            role=roles.ROOT,
            words=f"gives the coordinator another online key, {new.online[:12]}…",
        )


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
    return changes


def _never() -> Target:
    raise AssertionError("a path of neither set")


def _compare_target(
    path: str, role: str, old: bytes | None, new: bytes | None, *, gone: bool, fresh: bool
) -> list[Change]:
    verb = "withdraws" if gone else "publishes" if fresh else "replaces"
    if path == MEMBERS and new is not None:
        before = Members.from_bytes(old) if old is not None else None
        return list(_members(before, Members.from_bytes(new)))
    if path == ADMINS and new is not None:
        before_admins = Admins.from_bytes(old) if old is not None else None
        return list(_admins(before_admins, Admins.from_bytes(new)))
    if path == POLICY_DOCUMENT and new is not None:
        return compare_policies(old, new)
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
    if (old.country, old.since) != (new.country, new.since):
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


# -- the policy ----------------------------------------------------------------------------------

_NAMES: Final[dict[str, str]] = {
    "/participation/min_participants": "the least number of participants",
    "/participation/min_countries": "the least number of countries",
    "/privacy/budgets/default/eps_total_micro": "the privacy budget of every dataset (epsilon)",
    "/privacy/eps_round_max_micro": "the most privacy that a round may cost (epsilon)",
    "/secagg/required": "whether secure aggregation is required",
    "/governance/policy_delay_hours": "the hours before a new policy takes effect",
    "/log/witness/quorum": "the quorum of witnesses",
}


def compare_policies(old: bytes | None, new: bytes) -> list[Change]:
    """Differences between two policy documents, leaf by leaf.

    Raises:
        MalformedMessageError: one of them is not a JSON object.
    """
    after = _object(new)
    if old is None:
        version = after.get("policy_version", "?")
        words = f"puts the first policy in force, version {version}"
        return [Change(kind="policy", role=roles.POLICY, words=words)]
    changes = [
        Change(
            kind=_policy_kind(pointer, before, now),
            role=roles.POLICY,
            words=_policy_words(pointer, before, now),
        )
        for pointer, before, now in _leaves(_object(old), after, "")
    ]
    substantial = [change for change in changes if change.kind != "renew"]
    return substantial or changes


def _object(data: bytes) -> dict[str, Any]:
    value = parse_json(data)
    if not isinstance(value, dict):
        raise MalformedMessageError("the policy is a JSON object")
    return value


def _leaves(old: Any, new: Any, pointer: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            step = str(key).replace("~", "~0").replace("/", "~1")
            yield from _leaves(old.get(key, _MISSING), new.get(key, _MISSING), f"{pointer}/{step}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, now) in enumerate(zip(old, new, strict=True)):
            yield from _leaves(before, now, f"{pointer}/{index}")
    elif type(old) is not type(new) or old != new:
        yield pointer, old, new


def _policy_kind(pointer: str, old: Any, new: Any) -> str:
    section = pointer.split("/")[1] if "/" in pointer else ""
    if section in _NEUTRAL:
        return "renew"
    if section == "governance":
        return "amendment"
    if pointer.startswith("/privacy/budgets"):
        lower = type(old) is int and type(new) is int and new < old
        return "policy" if lower else "budget"
    if section == "code":
        return "code"
    return "policy" if section in _POLICY_SECTIONS else "unclassified"


def _policy_words(pointer: str, old: Any, new: Any) -> str:
    name = _NAMES.get(pointer, f"{pointer} of the policy")
    if old is _MISSING:
        return f"adds {name}: {_show(pointer, new)}"
    if new is _MISSING:
        return f"removes {name}, which was {_show(pointer, old)}"
    if type(old) is int and type(new) is int:
        verb = "raises" if new > old else "lowers"
        return f"{verb} {name} from {_show(pointer, old)} to {_show(pointer, new)}"
    return f"changes {name} from {_show(pointer, old)} to {_show(pointer, new)}"


def _show(pointer: str, value: Any) -> str:
    if type(value) is int and pointer.endswith("_micro"):
        return f"{value / 1_000_000:g}"
    if value is True or value is False:
        return "yes" if value else "no"
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "…"


def check_majorities(before: TrustState | None, after: TrustState) -> list[Change]:
    """Compare, and refuse what too few have signed for what it changes.

    Returns:
        The changes, for people.

    Raises:
        TrustRefusedError: trust.majority.
    """
    changes = compare(before, after)
    for role, need in majorities(changes, after.charter.terms).items():
        if need and role in after.quorums:
            after.quorums[role].require(need)
    return changes
