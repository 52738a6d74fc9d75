"""The roles of the trust repository: what each may publish, whose keys sign it, how long it lasts.

    root, targets                         the admins
    policy, membership, plans             the admins, terminating
    emergency                             any two admins, terminating; denials only
    release                               the release board (the admins, where there is no board)
    inst-<id>                             that institution's own keys
    snapshot, timestamp                   the coordinator's online key, and nothing else

``policy/*`` matches one level of path only. A threshold is never less than a majority of the
admins, and there are three admins or more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocols.errors import MalformedMessageError
from protocols.governance.errors import TrustRefusedError
from protocols.identifiers import NodeId, parse_node_id

ROOT: Final = "root"
TARGETS: Final = "targets"
SNAPSHOT: Final = "snapshot"
TIMESTAMP: Final = "timestamp"
POLICY: Final = "policy"
MEMBERSHIP: Final = "membership"
PLANS: Final = "plans"
EMERGENCY: Final = "emergency"
RELEASE: Final = "release"
ONLINE: Final = (SNAPSHOT, TIMESTAMP)
ADMIN_ROLES: Final = (ROOT, TARGETS, POLICY, MEMBERSHIP, PLANS)  # the admins' full threshold
CENTRAL: Final = (POLICY, MEMBERSHIP, PLANS, EMERGENCY, RELEASE)  # delegated, in this order
NEEDED: Final = (POLICY, MEMBERSHIP, PLANS)  # without them, or past their time, nothing is in force
EMERGENCY_THRESHOLD: Final = 2
MIN_ADMINS: Final = 3
_INSTITUTION: Final = "inst-"

PATHS: Final[dict[str, tuple[str, ...]]] = {
    POLICY: ("policy/*", "governance/*"),
    MEMBERSHIP: ("membership/*",),
    PLANS: ("plans/*",),
    EMERGENCY: ("emergency/*",),
    RELEASE: ("release/*",),
}
# How long a signature of each role is good for at most, days.
DAYS: Final[dict[str, int]] = {
    ROOT: 365,
    TARGETS: 180,
    POLICY: 90,
    MEMBERSHIP: 30,
    PLANS: 90,
    EMERGENCY: 3,
    RELEASE: 90,
    SNAPSHOT: 7,
    TIMESTAMP: 1,
}
INSTITUTION_DAYS: Final = 90


def institution_role(institution: str) -> str:
    """The role of an institution's own documents."""
    return _INSTITUTION + parse_node_id(institution)


def institution_of(role: str) -> NodeId | None:
    """Whose role it is; None: not an institution's."""
    if not role.startswith(_INSTITUTION):
        return None
    try:
        return parse_node_id(role.removeprefix(_INSTITUTION))
    except MalformedMessageError:
        return None


def paths_of(role: str) -> tuple[str, ...]:
    """What a delegated role may publish.

    Raises:
        TrustRefusedError: trust.shape: there is no such role.
    """
    institution = institution_of(role)
    if institution is not None:
        return (f"inst/{institution}/*",)
    if role not in PATHS:
        raise TrustRefusedError(f"there is no role {role!r:.60}", rule="trust.shape")
    return PATHS[role]


def days_of(role: str) -> int:
    """How long a signature of the role is good for at most."""
    return DAYS.get(role, INSTITUTION_DAYS)


def least_threshold(admins: int) -> int:
    """A majority."""
    return admins // 2 + 1


@dataclass(frozen=True, slots=True)
class Terms:
    """How many admins there are and how many must sign."""

    admins: int
    threshold: int
    min_countries: int

    def __post_init__(self) -> None:
        if self.admins < MIN_ADMINS:
            raise TrustRefusedError(
                f"{self.admins} admins: a federation has {MIN_ADMINS} or more", rule="trust.shape"
            )
        if not least_threshold(self.admins) <= self.threshold <= self.admins:
            raise TrustRefusedError(
                f"a threshold of {self.threshold} of {self.admins}: at least "
                f"{least_threshold(self.admins)} must sign",
                rule="trust.quorum",
            )
        if not 1 <= self.min_countries <= self.threshold:
            raise TrustRefusedError(
                f"signers of {self.min_countries} countries cannot be among {self.threshold}",
                rule="trust.shape",
            )

    def at_least(self, of_nine: int) -> int:
        """A majority of the decision table, which is written for nine admins."""
        return max(self.threshold, -(-of_nine * self.admins // 9))
