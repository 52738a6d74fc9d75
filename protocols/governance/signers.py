"""A threshold counts distinct keys AND distinct institutions, at signing and at every load.

TUF counts key ids. Here, beside TUF's own verification: every id is recomputed from its key; no two
keys of a role are one key in two spellings; an institution signs once; the signers come from
``min_countries`` countries. Who holds a key stands in the root (protocols/governance/keys.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tuf.api.metadata import Key, Metadata, Root, Targets

from protocols.errors import MalformedMessageError
from protocols.governance import roles
from protocols.governance.errors import ForgedError, TrustRefusedError
from protocols.governance.keys import Holder, check_key, holder_of, material
from protocols.identifiers import FederationId, parse_federation_id

FEDERATION_FIELD: Final = "x-minga-federation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quorum:
    """Who signed one metadata file, who has not, and how many institutions must."""

    role: str
    version: int
    need: int  # distinct institutions
    min_countries: int
    signed: tuple[Holder, ...]
    unsigned: tuple[Holder, ...]
    keys: tuple[str, ...] = ()  # ids of the keys that signed

    @property
    def countries(self) -> int:
        """Of the signers."""
        return len({holder.country for holder in self.signed})

    @property
    def complete(self) -> bool:
        """Whether nobody's signature is missing."""
        return self.missing is None

    @property
    def counted(self) -> int:
        """Distinct institutions; of an institution's own role, distinct holders."""
        if roles.institution_of(self.role) is not None:
            return len({holder.person for holder in self.signed})
        return len({holder.institution for holder in self.signed})

    @property
    def missing(self) -> str | None:
        """What is missing, in words; None: nothing."""
        institutions = self.counted
        if institutions < self.need:
            return (
                f"{self.role} {self.version} is signed for {institutions} institutions, "
                f"{self.need} must sign"
            )
        if self.countries < self.min_countries:
            return (
                f"{self.role} {self.version} is signed from {self.countries} countries, "
                f"{self.min_countries} are needed"
            )
        return None

    def require(self, need: int | None = None) -> None:
        """Refuse too few signers.

        Args:
            need: a higher number of institutions than the role's, by the kind of change.

        Raises:
            TrustRefusedError: trust.quorum, or trust.majority where only ``need`` is missed.
        """
        if self.missing is not None:
            raise TrustRefusedError(self.missing, rule="trust.quorum")
        if need is not None and self.counted < need:
            raise TrustRefusedError(
                f"{self.role} {self.version} is signed for {self.counted} institutions; "
                f"what it changes needs {need}",
                rule="trust.majority",
            )


def distinct(keys: Iterable[Key]) -> None:
    """No key stands twice, under whatever id. Raises: TrustRefusedError: trust.alias."""
    seen: dict[bytes, str] = {}
    for key in keys:
        check_key(key)
        other = seen.setdefault(material(key), key.keyid)
        if other != key.keyid:
            raise TrustRefusedError(
                f"{other[:12]}… and {key.keyid[:12]}… are one key", rule="trust.alias"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Charter:
    """What the root itself says: the federation, its admins, and how many must agree."""

    federation: FederationId
    terms: roles.Terms
    holders: Mapping[str, Holder]  # of the admins' keys, by key id
    online: str  # key id of the coordinator's key


def read_charter(root: Root) -> Charter:
    """Check the shape of a root and read who decides. Signatures are ``quorum``'s business.

    Raises:
        TrustRefusedError: trust.shape, trust.alias, trust.institution or trust.quorum.
        MalformedMessageError: a field cannot be read.
    """
    said = root.unrecognized_fields.get(FEDERATION_FIELD)
    if not isinstance(said, dict) or set(said) != {"federation", "min_countries"}:
        raise MalformedMessageError("the root does not say of which federation it is")
    if type(said["min_countries"]) is not int:
        raise MalformedMessageError("min_countries is a number")
    if root.consistent_snapshot is not True:
        raise TrustRefusedError("the root does not keep every version", rule="trust.shape")
    if set(root.roles) != {roles.ROOT, roles.TARGETS, *roles.ONLINE}:
        raise TrustRefusedError("the root has other roles than it must have", rule="trust.shape")
    decide, publish = root.roles[roles.ROOT], root.roles[roles.TARGETS]
    if (set(decide.keyids), decide.threshold) != (set(publish.keyids), publish.threshold):
        raise TrustRefusedError(
            "root and targets are not signed by the same admins", rule="trust.shape"
        )
    online = {keyid for name in roles.ONLINE for keyid in root.roles[name].keyids}
    if len(online) != 1 or any(root.roles[name].threshold != 1 for name in roles.ONLINE):
        raise TrustRefusedError("snapshot and timestamp have one online key", rule="trust.shape")
    used = {*decide.keyids, *online}
    if set(root.keys) != used or len(used) != len(decide.keyids) + 1:
        raise TrustRefusedError("the root lists keys without a role", rule="trust.shape")
    distinct(root.keys.values())
    holders = {keyid: holder_of(root.keys[keyid]) for keyid in decide.keyids}
    seats: dict[str, Holder] = {}
    people: set[str] = set()
    for holder in holders.values():
        other = seats.setdefault(holder.institution, holder)
        if other is not holder or holder.person in people:
            raise TrustRefusedError(
                f"{other.person} and {holder.person} hold two keys of one institution, "
                f"{holder.institution}",
                rule="trust.institution",
            )
        people.add(holder.person)
    terms = roles.Terms(len(holders), decide.threshold, said["min_countries"])
    return Charter(
        federation=parse_federation_id(said["federation"]),
        terms=terms,
        holders=holders,
        online=next(iter(online)),
    )


def check_delegations(targets: Targets, charter: Charter) -> None:
    """Check that the delegations are those of the specification and no others.

    Raises:
        TrustRefusedError: trust.shape or trust.alias.
    """
    if targets.targets:
        raise TrustRefusedError("the role targets publishes nothing itself", rule="trust.shape")
    delegations = targets.delegations
    if delegations is None or delegations.roles is None:
        raise TrustRefusedError("the targets delegate to nobody", rule="trust.shape")
    if tuple(delegations.roles)[: len(roles.CENTRAL)] != roles.CENTRAL:
        raise TrustRefusedError(
            f"the first delegations must be {', '.join(roles.CENTRAL)}", rule="trust.shape"
        )
    distinct(delegations.keys.values())
    for name, role in delegations.roles.items():
        if role.paths is None or tuple(role.paths) != roles.paths_of(name) or not role.terminating:
            raise TrustRefusedError(
                f"role {name} may publish other paths than its own", rule="trust.shape"
            )
        keyids = set(role.keyids)
        if name == roles.EMERGENCY:
            sound = keyids == set(charter.holders) and role.threshold == roles.EMERGENCY_THRESHOLD
        elif name == roles.RELEASE:
            sound = len(keyids) >= MIN_BOARD and role.threshold >= roles.least_threshold(
                len(keyids)
            )
        elif roles.institution_of(name) is not None:
            sound = 1 <= len(keyids) <= 3 and 1 <= role.threshold <= min(2, len(keyids))
        else:
            terms = charter.terms
            sound = keyids == set(charter.holders) and role.threshold == terms.threshold
        if not sound:
            raise TrustRefusedError(
                f"role {name} is signed by other keys or fewer than it must", rule="trust.shape"
            )


MIN_BOARD: Final = 3


def quorum(
    delegator: Root | Targets, role: str, metadata: Metadata[Any], charter: Charter
) -> Quorum:
    """Who signed a metadata file, of those who may, counted by institution.

    Args:
        delegator: the metadata that names the role's keys; already verified.
        role: whose metadata it is.
        metadata: with its signatures.
        charter: of the root in force.
    """
    result = delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    distinct([*result.signed.values(), *result.unsigned.values()])

    def holder(keyid: str, key: Key) -> Holder:
        return charter.holders.get(keyid) or holder_of(key)

    central = role in roles.ADMIN_ROLES
    return Quorum(
        role=role,
        version=metadata.signed.version,
        need=result.threshold,
        min_countries=charter.terms.min_countries if central else 1,
        signed=tuple(sorted(holder(*item) for item in result.signed.items())),
        unsigned=tuple(sorted(holder(*item) for item in result.unsigned.items())),
        keys=tuple(sorted(result.signed)),
    )


def online_signed(root: Root, role: str, metadata: Metadata[Any]) -> None:
    """The coordinator's key signed snapshot or timestamp. Raises: ForgedError."""
    if not root.get_verification_result(role, metadata.signed_bytes, metadata.signatures).verified:
        raise ForgedError(f"{role} {metadata.signed.version} is not signed by the online key")
