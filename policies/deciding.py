"""Whether what was published may follow what is in force: who signed, and for what.

The kinds of changes are ``policies.trust``; how many institutions must sign for a kind is the
decision table of the policy in force (``policies.effect``); whoever's privacy budget grows must
agree itself (``policies.agreement``). Coordinator, nodes, admins and auditors ask the same here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from tuf.api.metadata import Key, Metadata, Root, Targets

from policies import changes as changes_of_policy
from policies.agreement import check_agreements
from policies.bodies import check_bodies
from policies.consortium import ConsortiumPolicy, Decisions
from policies.decision import Refused
from policies.effect import POLICY_DOCUMENT, At, PolicyHistory
from policies.trust import Change, compare, compare_documents, who_decides
from protocols.governance import roles
from protocols.governance.building import apply_candidates
from protocols.governance.documents import Admins
from protocols.governance.errors import TrustRefusedError
from protocols.governance.keys import holder_of
from protocols.governance.repository import (
    Files,
    MemoryFiles,
    Target,
    TrustState,
    parse_metadata,
    read_target,
    verify_repository,
)
from protocols.governance.requests import Opened
from protocols.governance.signers import read_charter
from protocols.identifiers import Digest


def policy_of(state: TrustState) -> ConsortiumPolicy:
    """The consortium's policy that a state publishes.

    Raises:
        TrustRefusedError: trust.shape: there is none, or it disagrees with the root.
        MalformedMessageError: it cannot be read.
    """
    data = state.documents.get(POLICY_DOCUMENT)
    if data is None:
        raise TrustRefusedError(f"{POLICY_DOCUMENT} is not published", rule="trust.shape")
    policy = ConsortiumPolicy.from_bytes(data)
    admins, terms = policy.governance.admins, state.charter.terms
    said = (admins.n, admins.threshold, admins.min_countries)
    if said != (terms.admins, terms.threshold, terms.min_countries):
        raise TrustRefusedError(
            f"the policy speaks of {admins.threshold} of {admins.n} admins, the root of "
            f"{terms.threshold} of {terms.admins}",
            rule="trust.shape",
        )
    if policy.federation != state.federation:
        raise TrustRefusedError("the policy is of another federation", rule="trust.shape")
    return policy


def check_approvers(
    old: ConsortiumPolicy | None, policy: ConsortiumPolicy, *admins: Admins
) -> None:
    """Whoever read a program that is newly allowed is an admin, of different institutions.

    What was allowed before stays so when an admin who read it goes.

    Raises:
        TrustRefusedError: trust.quorum.
    """
    seats = {person.id: person.institution for some in admins for person in some.admins()}
    need = policy.governance.decisions.code_approvers
    known = old.code.allowed if old is not None else ()
    for code in policy.code.allowed:
        if code in known:
            continue
        institutions = {seats[name] for name in code.approved_by if name in seats}
        if len(institutions) < need:
            raise TrustRefusedError(
                f"code {code.image[:19]}… is approved by admins of {len(institutions)} "
                f"institutions, {need} must have read it",
                rule="trust.quorum",
            )


def majorities(
    changes: Iterable[Change],
    before: TrustState | None,
    after: TrustState,
    in_force: ConsortiumPolicy | None = None,
) -> dict[str, int]:
    """Distinct institutions that must sign each role's metadata file, by what it changes.

    The decision table is that of the policy in force before; of the founding, its own. Never less
    than the root's threshold, never more than there are admins; roles that others than the admins
    sign keep their own.

    Args:
        in_force: where a policy was published that does not count yet, the one that does.
    """
    table = (in_force or policy_of(before or after)).governance.decisions
    terms = after.charter.terms
    found: dict[str, int] = {}
    for change in changes:
        if change.role not in roles.ADMIN_ROLES:
            continue
        count = min(terms.admins, max(terms.threshold, change.count(table)))
        found[change.role] = max(found.get(change.role, 0), count)
    return found


def check_successor(
    before: TrustState | None, after: TrustState, *, in_force: ConsortiumPolicy | None = None
) -> list[Change]:
    """What changes, once it is shown that enough signed for it.

    Args:
        in_force: the policy that counts at this time; None: the one that ``before`` publishes.

    Raises:
        TrustRefusedError: trust.majority; trust.consent: an institution has not agreed to its
            larger budget; or trust.shape where the policy does not follow.
        MalformedMessageError: the policy cannot be read.
    """
    policy = policy_of(after)
    old = policy_of(before) if before is not None else None
    check_approvers(old, policy, after.admins)
    if old is not None and old.digest != policy.digest:
        decision = changes_of_policy.check_successor(old, policy)
        if isinstance(decision, Refused):
            raise TrustRefusedError(str(decision), rule="trust.shape")
    for role in sorted(after.quorums.keys() - set(roles.CENTRAL)):
        touched = before is None or before.versions.get(role, 0) < after.versions[role]
        if touched and roles.institution_of(role) is not None:
            after.quorums[role].require()  # what an institution brings, it has signed
    changes = compare(before, after)
    for role, need in majorities(changes, before, after, in_force).items():
        if role in after.quorums:
            after.quorums[role].require(need)
    check_agreements(old, policy, after)
    check_bodies(before, after, in_force or old or policy)
    return changes


def preview(opened: Opened, *, now: datetime) -> tuple[TrustState, list[Change], dict[str, int]]:
    """What would be in force: the candidate state, its changes, and the majorities they need.

    Signatures of the candidates are not asked for here; everything else is.

    Raises:
        TrustRefusedError, MalformedMessageError: what no majority could put in force.
    """
    merged = apply_candidates(opened.base, opened.files, now=now, before=opened.before)
    first = opened.base.get("metadata/1.root.json") or merged.get("metadata/1.root.json")
    if first is None:
        raise TrustRefusedError("there is no first root", rule="trust.shape")
    after = verify_repository(
        MemoryFiles(merged), trusted_root=first, now=now, offline=True, signed=False
    )
    changes = compare(opened.before, after)
    return after, changes, majorities(changes, opened.before, after)


def check_steps(
    before: TrustState,
    after: TrustState,
    files: Files,
    *,
    history: PolicyHistory | None = None,
    at: At | None = None,
    now: datetime | None = None,
) -> list[Change]:
    """Every version between two states, one by one: a reader that was away must not be skipped.

    Each version of policy and membership is compared with the one before it, and the signatures on
    that very file are counted, by distinct institutions, under the keys of all roots between the
    two states. So a change that needs more than its role cannot hide behind a later, smaller one.
    How many must sign is the table of the policy that was in force when the file was published.

    Args:
        history, at: which policy that was; None: the one published before it.
        now: UTC; None: the newest policy judges what is no version of policy or membership.

    Returns:
        What changed, for people.

    Raises:
        TrustRefusedError: trust.majority, trust.consent, or trust.shape where a version cannot be
            had.
        MalformedMessageError, DigestMismatchError: a file is not what it should be.
    """
    keys = keys_between(before, after, files)
    changes: list[Change] = list(who_decides(before, after))
    for role in (roles.POLICY, roles.MEMBERSHIP):
        targets = {p: t for p, t in before.targets.items() if t.role == role}
        documents = {p: d for p, d in before.documents.items() if p in targets}
        for version in range(before.versions[role] + 1, after.versions[role] + 1):
            metadata = parse_metadata(_must(files, f"{version}.{role}.json"), Targets)
            new = {
                path: Target(
                    path=path,
                    role=role,
                    sha256=Digest(info.hashes.get("sha256", "")),
                    length=info.length,
                )
                for path, info in metadata.signed.targets.items()
            }
            read = {path: read_target(files, target) for path, target in new.items()}
            step = compare_documents(targets, documents, new, read)
            if history is not None and at is not None:
                tables = _tables_at(history, role, version, at(role, version))
            else:
                tables = [_table(documents if role == roles.POLICY else before.documents)]
            need = min(max((change.count(table) for change in step), default=0) for table in tables)
            signed = signed_for(metadata, keys)
            if signed < min(need, after.charter.terms.admins):
                raise TrustRefusedError(
                    f"{role} {version} is signed for {signed} institutions; what it changes "
                    f"needs {need}",
                    rule="trust.majority",
                )
            if role == roles.POLICY:
                old_policy = ConsortiumPolicy.from_bytes(documents[POLICY_DOCUMENT])
                new_policy = ConsortiumPolicy.from_bytes(read.get(POLICY_DOCUMENT, b""))
                check_approvers(old_policy, new_policy, before.admins, after.admins)
                check_agreements(old_policy, new_policy, after)
            changes += step
            targets, documents = new, read
    newest = policy_of(after)
    counts = history.in_force(now) if history is not None and now is not None else newest
    check_bodies(before, after, counts)
    return changes


def _tables_at(history: PolicyHistory, role: str, version: int, at: datetime) -> list[Decisions]:
    """Decision tables by which a file of this time may be judged.

    A policy does not judge itself. Times are whole seconds: where a policy without delay took
    effect in the very second, the file may have been published before it or after it.
    """
    known = history.before(version) if role == roles.POLICY else history
    times = (at, at - timedelta(seconds=1))
    return [known.in_force(time).governance.decisions for time in times]


def _must(files: Files, name: str) -> bytes:
    data = files.metadata(name)
    if data is None:
        raise TrustRefusedError(f"{name} is missing", rule="trust.shape")
    return data


def _table(documents: Mapping[str, bytes]) -> Decisions:
    data = documents.get(POLICY_DOCUMENT)
    if data is None:
        raise TrustRefusedError(f"{POLICY_DOCUMENT} is not published", rule="trust.shape")
    return ConsortiumPolicy.from_bytes(data).governance.decisions


def keys_between(before: TrustState | None, after: TrustState, files: Files) -> dict[str, Key]:
    """Keys of all admins of the roots between two states, by key id; from the first root, where
    nothing was accepted before. Raises: TrustRefusedError: trust.shape: a root is missing."""
    found: dict[str, Key] = {}
    for version in range(before.root_version if before else 1, after.root_version + 1):
        root = parse_metadata(_must(files, f"{version}.root.json"), Root).signed
        for keyid in read_charter(root).holders:
            found[keyid] = root.keys[keyid]
    return found


def check_known_approvers(policy: ConsortiumPolicy, after: TrustState, files: Files) -> None:
    """Who read the listed programs was an admin of some root, of enough different institutions.

    For a reader at its first contact: who of them still is an admin does not matter.

    Raises:
        TrustRefusedError: trust.quorum; trust.shape: a root is missing.
    """
    seats: dict[str, str] = {}
    for version in range(1, after.root_version + 1):
        root = parse_metadata(_must(files, f"{version}.root.json"), Root).signed
        seats |= {who.person: who.institution for who in read_charter(root).holders.values()}
    need = policy.governance.decisions.code_approvers
    for code in policy.code.allowed:
        institutions = {seats[name] for name in code.approved_by if name in seats}
        if len(institutions) < need:
            raise TrustRefusedError(
                f"code {code.image[:19]}… is approved by admins of {len(institutions)} "
                f"institutions, {need} must have read it",
                rule="trust.quorum",
            )


def check_old_policy(version: int, data: bytes, after: TrustState, files: Files) -> None:
    """An older file of role policy was signed by a threshold, under the keys of all roots so far.

    Raises:
        TrustRefusedError: trust.quorum; trust.shape: a root is missing.
        MalformedMessageError: it cannot be read.
    """
    roots = [
        read_charter(parse_metadata(_must(files, f"{v}.root.json"), Root).signed)
        for v in range(1, after.root_version + 1)
    ]
    least = min(charter.terms.threshold for charter in roots)
    keys = keys_between(None, after, files)
    signed = signed_for(parse_metadata(data, Targets), keys)
    if signed < least:
        raise TrustRefusedError(
            f"{roles.POLICY} {version} is signed for {signed} institutions", rule="trust.quorum"
        )


def signed_for(metadata: Metadata[Targets], keys: Mapping[str, Key]) -> int:
    """Distinct institutions whose admins signed a file, of these keys."""
    institutions = set()
    for keyid, signature in metadata.signatures.items():
        key = keys.get(keyid)
        if key is None:
            continue
        try:
            key.verify_signature(signature, metadata.signed_bytes)
        except (UnverifiedSignatureError, VerificationError):
            continue
        institutions.add(holder_of(key).institution)
    return len(institutions)
