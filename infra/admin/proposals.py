"""What can be proposed: each gives a signing request over the repository as it is now.

Nothing is written and nothing is sent here; proposing needs no key. Whether enough sign for what a
proposal changes is found out from the documents, by whoever reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.signer import SSlibKey
from tuf.api.metadata import Key, Metadata, Root, Targets

from infra.admin.keys import Card
from policies.agreement import consent_bytes, consent_path
from policies.consortium import ConsortiumPolicy
from policies.effect import POLICY_DOCUMENT
from policies.overrides import Override
from protocols.errors import ConfigurationError, ExistsError, NotFoundError
from protocols.governance import roles
from protocols.governance.building import changed_role, new_role, new_root, new_targets
from protocols.governance.documents import (
    ADMINS,
    EMERGENCY_HOURS,
    MEMBERS,
    Admins,
    Denials,
    Emergency,
    Institution,
    Members,
    Person,
    time_text,
)
from protocols.governance.keys import Holder, ed25519_key
from protocols.governance.repository import (
    MemoryFiles,
    TrustState,
    parse_metadata,
    plan_path,
    verify_repository,
)
from protocols.governance.requests import SigningRequest, make_request
from protocols.identifiers import FederationId, NodeId
from protocols.plan import Plan

TERM_DAYS = 730


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The repository as it is, verified from a root that the reader holds."""

    files: Mapping[str, bytes]
    state: TrustState
    now: datetime


def read_files(folder: Path) -> dict[str, bytes]:
    """A repository's files by name: what ``Files`` needs, from a folder like ``demo-run/tuf``.

    Raises:
        NotFoundError: there is no repository.
    """
    found: dict[str, bytes] = {}
    for part in ("metadata", "targets"):
        for path in sorted((folder / part).rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                found[path.relative_to(folder).as_posix()] = path.read_bytes()
    if "metadata/timestamp.json" not in found:
        raise NotFoundError(f"{folder} holds no trust repository")
    return found


def read_base(folder: Path, *, now: datetime, root: bytes | None = None) -> Base:
    """Read and verify a repository.

    Raises:
        NotFoundError, TrustRefusedError, ForgedError.
    """
    files = read_files(folder)
    first = root or files.get("metadata/1.root.json")
    if first is None:
        raise NotFoundError(f"{folder} has no root")
    state = verify_repository(MemoryFiles(files), trusted_root=first, now=now, offline=True)
    return Base(files=_needed(files, state), state=state, now=now)


def _needed(files: Mapping[str, bytes], state: TrustState) -> dict[str, bytes]:
    """Only what the present state is made of: old versions do not travel with a request."""
    names = {"metadata/timestamp.json"}
    for role, version in state.versions.items():
        if role != roles.TIMESTAMP:
            names.add(f"metadata/{version}.{role}.json")
    names |= {name for name in files if name.endswith(".root.json")}
    kept = {name: files[name] for name in names if name in files}
    kept |= {
        name: data
        for name, data in files.items()
        if name.startswith("targets/")
        and any(
            name == _target_file(target.path, target.sha256) for target in state.targets.values()
        )
    }
    return kept


def _target_file(path: str, sha256: str) -> str:
    from protocols.governance.repository import target_name

    return target_name(path, sha256)


# -- the founding --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Founding:
    """What a federation begins with."""

    federation: FederationId
    online: Key
    admins: Sequence[Card]
    threshold: int
    min_countries: int
    policy: Mapping[str, bytes]  # policy/… and governance/… documents by path
    members: Members
    others: Sequence[tuple[Card, tuple[str, ...]]] = ()  # auditors and the like, with their roles
    board: Sequence[Card] = ()


def person_of(card: Card, office: Iterable[str], now: datetime) -> Person:
    """A person for admins.json."""
    holder = card.holder
    return Person.from_value(
        {
            "id": holder.person,
            "institution": holder.institution,
            "country": holder.country,
            "keyid": card.public.keyid,
            "roles": tuple(sorted(office)),
            "term_from": time_text(now),
            "term_until": time_text(now + timedelta(days=TERM_DAYS)),
        }
    )


def institution_keys(members: Members) -> dict[NodeId, list[SSlibKey]]:
    """Keys of the institutions' own roles: of those who are or may again be members."""
    return {
        NodeId(item.id): [
            ed25519_key(
                bytes.fromhex(key),
                Holder(person=f"{item.id}-{n}", institution=NodeId(item.id), country=item.country),
            )
            for n, key in enumerate(item.keys, 1)
        ]
        for item in members.institutions
        if item.status in ("active", "suspended")
    }


def institution_of_card(card: Card, now: datetime) -> Institution:
    """A member by the card of its key."""
    holder, public = card.holder, card.public
    if public.keytype != "ed25519":
        raise ConfigurationError("an institution's key is an Ed25519 key")
    return Institution.make(
        id=holder.institution,
        country=holder.country,
        status="active",
        roles=["member"],
        keys=[public.keyval["public"]],
        nodes=["1"],
        witnesses=[],
        since=time_text(now),
    )


def founding_members(federation: str, cards: Iterable[Card], now: datetime) -> Members:
    """The first members, by the cards of their keys."""
    items = sorted((institution_of_card(card, now) for card in cards), key=lambda item: item.id)
    return Members.make(federation=federation, institutions=[item.model_dump() for item in items])


def propose_founding(founding: Founding, *, now: datetime) -> SigningRequest:
    """Version 1 of everything.

    Raises:
        TrustRefusedError: the admins cannot be those of a federation.
    """
    admins = [card.public for card in founding.admins]
    offices: dict[str, tuple[Card, set[str]]] = {}
    for card, office in (
        *((card, ("admin",)) for card in founding.admins),
        *founding.others,
        *((card, ("release-board",)) for card in founding.board),
    ):  # an admin may sit on the board
        offices.setdefault(card.holder.person, (card, set()))[1].update(office)
    people = [person_of(card, office, now) for card, office in offices.values()]
    listed = Admins.make(
        federation=founding.federation,
        threshold=founding.threshold,
        min_countries=founding.min_countries,
        people=tuple(sorted(people, key=lambda person: person.id)),
    )
    listed.check_duties()
    root = new_root(
        federation=founding.federation,
        admins=admins,
        threshold=founding.threshold,
        min_countries=founding.min_countries,
        online=founding.online,
        version=1,
        now=now,
    )
    targets = new_targets(
        admins=admins,
        threshold=founding.threshold,
        board=[card.public for card in founding.board],
        institutions=institution_keys(founding.members),
        version=1,
        now=now,
    )
    documents: dict[str, dict[str, bytes]] = {
        roles.POLICY: dict(founding.policy),
        roles.MEMBERSHIP: {MEMBERS: founding.members.to_bytes(), ADMINS: listed.to_bytes()},
        roles.PLANS: {},
    }
    candidates: dict[str, Metadata[Any]] = {roles.ROOT: root, roles.TARGETS: targets}
    files: dict[str, bytes] = {}
    for role, content in documents.items():
        made, new = new_role(role, content, version=1, now=now)
        candidates[role] = made
        files |= new
    return make_request(
        federation=founding.federation,
        title="founding",
        base={},
        candidates=candidates,
        targets=files,
        now=now,
    )


# -- afterwards ----------------------------------------------------------------------------------


def _request(
    base: Base, title: str, candidates: Mapping[str, Metadata[Any]], files: Mapping[str, bytes]
) -> SigningRequest:
    return make_request(
        federation=base.state.federation,
        title=title,
        base=base.files,
        candidates=candidates,
        targets=files,
        now=base.now,
    )


def propose_documents(
    base: Base, role: str, title: str, *, put: Mapping[str, bytes], drop: Iterable[str] = ()
) -> SigningRequest:
    """Replace or withdraw documents of one role."""
    gone = list(drop)
    for path in gone:
        if path not in base.state.targets:
            raise NotFoundError(f"{path} is not published")
    made, files = changed_role(base.state, role, put=put, drop=gone, now=base.now)
    return _request(base, title, {role: made}, files)


def propose_policy(base: Base, documents: Mapping[str, bytes]) -> SigningRequest:
    """A new policy, its rules, or the text of GOVERNANCE.md; by path."""
    title = "policy" if POLICY_DOCUMENT in documents else "governance"
    return propose_documents(base, roles.POLICY, title, put=documents)


def propose_agreement(base: Base, name: str, policy: ConsortiumPolicy) -> SigningRequest:
    """An institution agrees to a policy that may raise its privacy budget: its own keys sign it.

    Raises:
        NotFoundError: it is no member.
    """
    role = roles.institution_role(name)
    if NodeId(name) not in institution_keys(base.state.members):
        raise NotFoundError(f"{name} is no member: nobody asks it")
    put = {consent_path(name, policy.policy_version): consent_bytes(name, policy)}
    return propose_documents(
        base, role, f"{name} agrees to policy {policy.policy_version}", put=put
    )


def propose_override(base: Base, override: Override) -> SigningRequest:
    """Let one plan past one rule of the consortium, for a short time."""
    title = f"override {override.rule}"
    put = {override.path: override.to_bytes()}
    return propose_documents(base, roles.POLICY, title, put=put)


def propose_plan(base: Base, plan: Plan) -> SigningRequest:
    """The terms of a run.

    Raises:
        ExistsError: another plan of this run is signed; a change is another run.
    """
    path = plan_path(plan.run_id)
    if path in base.state.targets:
        raise ExistsError(f"a plan of run {plan.run} is signed already: give the run another name")
    return propose_documents(base, roles.PLANS, f"plan {plan.run}", put={path: plan.to_bytes()})


def propose_members(base: Base, members: Members, title: str) -> SigningRequest:
    """A new list of members, and the delegations to those that may publish themselves."""
    made, files = changed_role(
        base.state, roles.MEMBERSHIP, put={MEMBERS: members.to_bytes()}, now=base.now
    )
    candidates: dict[str, Metadata[Any]] = {roles.MEMBERSHIP: made}
    before, after = institution_keys(base.state.members), institution_keys(members)
    if {k: [key.keyid for key in v] for k, v in before.items()} != {
        k: [key.keyid for key in v] for k, v in after.items()
    }:
        old = parse_metadata(base.state.metadata[roles.TARGETS], Targets).signed
        candidates[roles.TARGETS] = new_targets(
            admins=_admin_keys(base.state),
            threshold=base.state.charter.terms.threshold,
            board=_board_keys(old, base.state),
            institutions=after,
            version=old.version + 1,
            now=base.now,
        )
    return _request(base, title, candidates, files)


def _admin_keys(state: TrustState) -> list[Key]:
    root = parse_metadata(state.metadata[roles.ROOT], Root).signed
    return [root.keys[keyid] for keyid in sorted(state.charter.holders)]


def _board_keys(targets: Targets, state: TrustState) -> list[Key]:
    delegations = targets.delegations
    if delegations is None or delegations.roles is None:
        return []
    keyids = delegations.roles[roles.RELEASE].keyids
    if set(keyids) == set(state.charter.holders):
        return []
    return [delegations.keys[keyid] for keyid in keyids]


def admitted(members: Members, institution: Institution) -> Members:
    """The list with one more member, or with one that comes back with new keys.

    Raises:
        ExistsError: it is an active member.
    """
    known = members.get(institution.id)
    if known is not None and known.status == "active":
        raise ExistsError(f"{institution.id} is an active member")
    others = [item for item in members.institutions if item.id != institution.id]
    return _with(members, (*others, institution))


def with_status(members: Members, name: str, status: str) -> Members:
    """The list with another status of one member. Raises: NotFoundError."""
    return _changed(members, name, {"status": status})


def with_keys(members: Members, name: str, keys: Sequence[str]) -> Members:
    """The list with other keys of one member. Raises: NotFoundError."""
    return _changed(members, name, {"keys": tuple(keys)})


def _changed(members: Members, name: str, update: dict[str, Any]) -> Members:
    known = members.get(name)
    if known is None:
        raise NotFoundError(f"{name} never was a member")
    changed = Institution.from_value(known.model_dump() | update)
    others = [item for item in members.institutions if item.id != name]
    return _with(members, (*others, changed))


def _with(members: Members, institutions: Iterable[Institution]) -> Members:
    ordered = tuple(sorted(institutions, key=lambda item: item.id))
    return Members.make(federation=members.federation, institutions=ordered)


def propose_emergency(
    base: Base, name: str, *, deny: Denials, code: str, hours: int = EMERGENCY_HOURS
) -> SigningRequest:
    """A notice that denies, at once and for 72 hours at most."""
    notice = Emergency.make(
        federation=base.state.federation,
        code=code,
        issued_at=time_text(base.now),
        until=time_text(base.now + timedelta(hours=hours)),
        deny=deny,
    )
    put = {f"emergency/{name}.json": notice.to_bytes()}
    return propose_documents(base, roles.EMERGENCY, f"emergency {name}", put=put)


def propose_rotation(
    base: Base,
    *,
    add: Sequence[Card] = (),
    remove: Sequence[str] = (),
    threshold: int | None = None,
    min_countries: int | None = None,
    online: Key | None = None,
) -> SigningRequest:
    """Another root: keys of admins that come and go, thresholds, the coordinator's online key.

    Everything the admins sign is signed again under the new keys, in the same request.

    Args:
        base: the repository.
        add: cards of keys that come.
        remove: people whose keys go.
        threshold: None: as it is.
        min_countries: None: as it is.
        online: None: as it is.

    Raises:
        NotFoundError: nobody of that name holds a key.
        TrustRefusedError: the admins would not be those of a federation.
    """
    state, now = base.state, base.now
    old = parse_metadata(state.metadata[roles.ROOT], Root).signed
    holders = state.charter.holders
    unknown = set(remove) - {holder.person for holder in holders.values()}
    if unknown:
        raise NotFoundError(f"{min(unknown)} holds no admin key")
    kept = [old.keys[keyid] for keyid in sorted(holders) if holders[keyid].person not in remove]
    admins = [*kept, *(card.public for card in add)]
    need = threshold or state.charter.terms.threshold
    countries = min_countries or state.charter.terms.min_countries
    root = new_root(
        federation=state.federation,
        admins=admins,
        threshold=need,
        min_countries=countries,
        online=online or old.keys[state.charter.online],
        version=old.version + 1,
        now=now,
    )
    before = parse_metadata(state.metadata[roles.TARGETS], Targets).signed
    targets = new_targets(
        admins=admins,
        threshold=need,
        board=_board_keys(before, state),
        institutions=institution_keys(state.members),
        version=before.version + 1,
        now=now,
    )
    coming = {card.holder.person for card in add}
    people = [
        person
        for person in state.admins.people
        if person.id not in coming and not ("admin" in person.roles and person.id in remove)
    ]
    people += [person_of(card, ("admin",), now) for card in add]
    listed = Admins.make(
        federation=state.federation,
        threshold=need,
        min_countries=countries,
        people=tuple(sorted(people, key=lambda person: person.id)),
    )
    listed.check_duties()
    candidates: dict[str, Metadata[Any]] = {roles.ROOT: root, roles.TARGETS: targets}
    files: dict[str, bytes] = {}
    for role in (roles.POLICY, roles.MEMBERSHIP, roles.PLANS, roles.EMERGENCY, roles.RELEASE):
        if role not in state.metadata or (role == roles.RELEASE and _board_keys(before, state)):
            continue
        put = {ADMINS: listed.to_bytes()} if role == roles.MEMBERSHIP else {}
        made, new = changed_role(state, role, put=put, now=now)
        candidates[role] = made
        files |= new
    return _request(base, "rotation of keys", candidates, files)


def expiring(base: Base, *, days: int = 14) -> list[str]:
    """Roles of the admins that end within some days, root apart; emergencies are left to lapse."""
    soon = base.now + timedelta(days=days)
    names = (roles.TARGETS, *roles.NEEDED, roles.RELEASE)
    return [
        name for name in names if name in base.state.expires and base.state.expires[name] < soon
    ]


def propose_renewal(base: Base, names: Iterable[str]) -> SigningRequest:
    """Sign roles again before they expire; nothing else changes."""
    candidates: dict[str, Metadata[Any]] = {}
    for role in names:
        if role == roles.ROOT:
            raise ConfigurationError("root is renewed by a rotation without changes")
        made, _ = changed_role(base.state, role, now=base.now)
        candidates[role] = made
    return _request(base, "renewal", candidates, {})
