"""What a publication says in the log besides its files: proposals, votes, denials.

    before, after, files -> Act ...     one leaf each, signed by the coordinator, before the files

A leaf cannot make anything count: what counts are the signatures in the files, and a ballot here
carries one of them, so that whoever reads the log sees who decided without any other file. Admins
who vote no, or want it on record before, sign a ``ballot`` themselves (`minga admin statement`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tuf.api.metadata import Metadata, Targets

from policies.consortium import ConsortiumPolicy
from policies.overrides import OVERRIDE_PREFIX, Override
from policies.releases import Reported, failures, model_of, released_between
from policies.trust import Change
from protocols.governance import roles
from protocols.governance.repository import TrustState, parse_metadata, sha256_of
from protocols.identifiers import Digest
from protocols.tlog.kinds import (
    Approval,
    Ballot,
    EmergencyNotice,
    OverrideGranted,
    PolicyProposed,
    Predicate,
    ReleaseApproved,
)
from protocols.tlog.text import encode_base64

MAX_APPROVALS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """One leaf about a publication."""

    file: tuple[str, int]  # role and version: said again only until that file is logged
    subject: str
    digest: Digest
    said: Predicate


def acts_of(
    before: TrustState | None,
    after: TrustState,
    changes: Sequence[Change],
    *,
    reports: Sequence[Reported] = (),
    policy: ConsortiumPolicy | None = None,
) -> tuple[Act, ...]:
    """The leaves of a publication, in order: proposals, ballots, overrides, emergencies, releases.

    Args:
        reports, policy: evaluations of the log and the policy in force, for releases.
    """
    found: list[Act] = []
    for role, version in sorted(after.versions.items()):
        old = before.versions.get(role, 0) if before is not None else 0
        if version > old and role not in (roles.ROOT, *roles.ONLINE) and role in after.quorums:
            found += _file(role, version, before, after, changes)
    if policy is not None:
        found += [
            _release(path, after, reports, policy) for path in released_between(before, after)
        ]
    return tuple(found)


def _release(
    path: str, after: TrustState, reports: Sequence[Reported], policy: ConsortiumPolicy
) -> Act:
    """``release.approved``: which evaluations it rests on, and who of the board signed."""
    model = model_of(path) or ""
    good = [
        item.leaf
        for item in reports
        if item.said.model == model and not list(failures(item.said, policy))
    ]
    version = after.versions[roles.RELEASE]
    metadata = parse_metadata(after.metadata[roles.RELEASE], Targets)
    return Act(
        file=(roles.RELEASE, version),
        subject=f"tuf/{roles.RELEASE}/{version}",
        digest=Digest(model),
        said=ReleaseApproved(
            model=model,
            card_sha256=after.targets[path].sha256,
            reports=tuple(good[:MAX_APPROVALS]),
            approvals=tuple(_approvals(metadata, after, roles.RELEASE)),
        ),
    )


def _file(
    role: str,
    version: int,
    before: TrustState | None,
    after: TrustState,
    changes: Sequence[Change],
) -> Iterator[Act]:
    metadata = parse_metadata(after.metadata[role], Targets)
    proposal = sha256_of(metadata.signed_bytes)  # what was signed: the file without signatures
    subject, name = f"tuf/{role}/{version}", (role, version)

    def act(said: Predicate, digest: Digest = proposal) -> Act:
        return Act(file=name, subject=subject, digest=digest, said=said)

    kinds = sorted({change.kind for change in changes if change.role == role}) or ["renew"]
    yield act(
        PolicyProposed(
            role=role,
            version=version,
            sha256=proposal,
            change="-".join(kinds)[:64],
            expires=f"{after.expires[role]:%Y-%m-%dT%H:%M:%SZ}",
        )
    )
    signed = _approvals(metadata, after, role)
    for approval in signed:
        yield act(Ballot(proposal_sha256=proposal, choice="yes", approval=approval))
    old = before.documents if before is not None else {}
    for path, data in sorted(_fresh(role, after, old).items()):
        if role == roles.POLICY and path.startswith(OVERRIDE_PREFIX):
            override = Override.from_bytes(data)
            yield act(
                OverrideGranted(
                    plan_sha256=override.plan,
                    rule=override.rule,
                    code=override.code,
                    expires=override.expires,
                    approvals=tuple(signed),
                ),
                sha256_of(data),
            )
        elif role == roles.EMERGENCY:
            notice = after.emergencies[path]
            yield act(
                EmergencyNotice(
                    document_sha256=sha256_of(data), code=notice.code, expires=notice.until
                ),
                sha256_of(data),
            )


def _fresh(role: str, after: TrustState, old: Mapping[str, bytes]) -> dict[str, bytes]:
    """Documents of a role that were not published before."""
    return {
        path: data
        for path, data in after.documents.items()
        if after.targets[path].role == role and old.get(path) != data
    }


def _approvals(metadata: Metadata[Targets], after: TrustState, role: str) -> list[Approval]:
    """The signatures that were counted, by key id."""
    quorum = after.quorums[role]
    return [
        Approval(
            key=keyid, signature=encode_base64(bytes.fromhex(metadata.signatures[keyid].signature))
        )
        for keyid in sorted(quorum.keys)
    ][:MAX_APPROVALS]
