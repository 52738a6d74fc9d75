"""Which policy is in force at a time: a new one waits for its delay, the old one stays until then.

    published policies, each with the time of its leaf -> when each takes effect -> one, at a time

A policy takes effect at the latest of

    its ``valid_from``
    the time of its ``tuf.published`` leaf + ``policy_delay_hours`` of the policy before it
    the same leaf + ``amendment_notice_days`` of the policy before it, if it is an amendment
    the moment at which the policy before it takes effect

so that no policy shortens its own delay, and none overtakes another. The first takes effect with
its publication. Emergencies are other documents and wait for nothing. Overrides, members and plans
do not wait either; what they need is counted by the policy in force, not by the one that waits.
Pure: times are arguments, and who gives them is said at each caller.
Normative text: protocols/spec/governance.md, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property
from typing import Final

from tuf.api.metadata import Targets

from policies.changes import describe_change
from policies.consortium import ConsortiumPolicy
from policies.document import parse_utc
from protocols.governance import roles
from protocols.governance.errors import TrustRefusedError
from protocols.governance.repository import (
    Files,
    Target,
    TrustState,
    parse_metadata,
    read_target,
    sha256_of,
)
from protocols.identifiers import Digest

POLICY_DOCUMENT: Final = "policy/consortium.json"
At = Callable[[str, int], datetime]  # role and version: when its leaf came into the log, UTC


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedPolicy:
    """One policy, as it was first published."""

    version: int  # of the metadata file of role policy
    at: datetime  # UTC: of its leaf; without a log, when the reader first saw it
    policy: ConsortiumPolicy


@dataclass(frozen=True)  # no slots: the times of effect are computed once
class PolicyHistory:
    """Every policy of a federation, in order; at least one."""

    steps: tuple[PublishedPolicy, ...]
    read_until: int  # the metadata version up to which files were read

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("a history begins with the first policy")

    @cached_property
    def effects(self) -> tuple[datetime, ...]:
        """When each takes effect, UTC."""
        found = [parse_utc(self.steps[0].policy.valid_from)]
        for before, step in zip(self.steps, self.steps[1:], strict=False):
            found.append(max(found[-1], takes_effect(before.policy, step.policy, step.at)))
        return tuple(found)

    def at(self, now: datetime) -> PublishedPolicy:
        """The policy in force at this time; before the first, the first (which says so itself)."""
        due = [step for step, since in zip(self.steps, self.effects, strict=True) if since <= now]
        return due[-1] if due else self.steps[0]

    def in_force(self, now: datetime) -> ConsortiumPolicy:
        """As ``at``; whether it has expired is ``ConsortiumPolicy.in_force``."""
        return self.at(now).policy

    def waiting(self, now: datetime) -> tuple[tuple[ConsortiumPolicy, datetime], ...]:
        """Policies that were published and do not count yet, each with the time it will."""
        return tuple(
            (step.policy, since)
            for step, since in zip(self.steps, self.effects, strict=True)
            if since > now and step is not self.steps[0]
        )

    def before(self, version: int) -> PolicyHistory:
        """What was known when this metadata version was published; never empty."""
        kept = tuple(step for step in self.steps if step.version < version)
        return PolicyHistory(kept or self.steps[:1], version - 1)

    def followed_by(self, version: int, policy: ConsortiumPolicy, at: datetime) -> PolicyHistory:
        """One more file was read; the same policy again is no step."""
        if policy == self.steps[-1].policy:
            return replace(self, read_until=version)
        step = PublishedPolicy(version=version, at=at, policy=policy)
        return PolicyHistory((*self.steps, step), version)


def beginning(version: int, policy: ConsortiumPolicy, at: datetime) -> PolicyHistory:
    """The history that begins with this policy."""
    return PolicyHistory((PublishedPolicy(version=version, at=at, policy=policy),), version)


def takes_effect(old: ConsortiumPolicy, new: ConsortiumPolicy, at: datetime) -> datetime:
    """When ``new``, published at this time after ``old``, may take effect at the earliest (UTC)."""
    delay = timedelta(hours=old.governance.policy_delay_hours)
    notice = timedelta(days=describe_change(old, new).notice_days)
    return max(parse_utc(new.valid_from), at + max(delay, notice))


def read_history(
    files: Files,
    state: TrustState,
    at: At,
    *,
    known: PolicyHistory | None = None,
    check: Callable[[int, bytes], None] = lambda _version, _data: None,
) -> PolicyHistory:
    """Read every version of role policy up to the state's.

    Args:
        files: of the repository, old versions too.
        state: verified; its own file of role policy counts as checked.
        at: when the leaf of a version came.
        known: what was read before; only what follows is read.
        check: raises for an older file that is not what was published.

    Raises:
        TrustRefusedError: trust.shape: a version cannot be had, or has no policy.
        MalformedMessageError, DigestMismatchError: a file is not what it should be.
    """
    newest, history = state.versions[roles.POLICY], known
    for version in range(history.read_until + 1 if history else 1, newest + 1):
        data = files.metadata(f"{version}.{roles.POLICY}.json")
        if data is None:
            raise TrustRefusedError(f"{version}.{roles.POLICY}.json is missing", rule="trust.shape")
        if version < newest:
            check(version, data)
        elif sha256_of(data) != state.published[(roles.POLICY, newest)]:
            raise TrustRefusedError(f"a second {roles.POLICY} {newest}", rule="trust.rollback")
        policy, when = _policy_in(files, data, version), at(roles.POLICY, version)
        if history is None:
            history = beginning(version, policy, when)
        else:
            history = history.followed_by(version, policy, when)
    if history is None:
        raise TrustRefusedError("there is no version of role policy", rule="trust.shape")
    return history


def _policy_in(files: Files, data: bytes, version: int) -> ConsortiumPolicy:
    targets = parse_metadata(data, Targets).signed.targets
    info = targets.get(POLICY_DOCUMENT)
    if info is None:
        raise TrustRefusedError(
            f"{POLICY_DOCUMENT} is not in {roles.POLICY} {version}", rule="trust.shape"
        )
    target = Target(
        path=POLICY_DOCUMENT,
        role=roles.POLICY,
        sha256=Digest(info.hashes.get("sha256", "")),
        length=info.length,
    )
    return ConsortiumPolicy.from_bytes(read_target(files, target))


# -- times, as they are kept -----------------------------------------------------------------------

_STAMP: Final = "%Y-%m-%dT%H:%M:%SZ"


def times_to_text(times: Mapping[int, datetime]) -> bytes:
    """One line a version of role policy: ``version time``."""
    return "".join(f"{v} {at:{_STAMP}}\n" for v, at in sorted(times.items())).encode()


def read_times(data: bytes) -> dict[int, datetime]:
    """The reverse; a line that cannot be read is left out: its time is found again."""
    found: dict[int, datetime] = {}
    for line in data.decode("ascii", "replace").splitlines():
        version, _, text = line.partition(" ")
        try:
            found[int(version)] = parse_utc(text)
        except ValueError:
            continue
    return found
