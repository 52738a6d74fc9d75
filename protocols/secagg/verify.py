"""What an auditor, or a node after its round, checks again from the published transcript.

    1. START: enough valid READYs of roster members, on this plan, model and roster.
    2. DEALs of exactly U1, bound to that START; with the checkpoint they give ctx.
    3. GO: every member of U1 was on that ctx.
    4. SURVIVORS: valid headers of enough members of U1.
    5. At least t survivors committed to exactly that list.
    6. Every REVEAL has one share for each member, of the one allowed kind, as it was dealt.
    7. The shares give exactly the published secrets, and these fit the DEALs.

The caller still owes: that START and the list are in the log and no second one is, that the
checkpoint is the log's, that the masked uploads have the roots of their headers, and that the
published sum is what ``recompute_sum`` gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from protocols.identifiers import NodeId
from protocols.secagg.checks import (
    Listed,
    check_commit_certificate,
    check_deals,
    check_go,
    check_reveal,
    check_start,
    check_survivors,
)
from protocols.secagg.context import Attempt
from protocols.secagg.coordinator import reconstruct
from protocols.secagg.errors import CheckFailedError
from protocols.secagg.masks import MaskAdder
from protocols.secagg.messages import OpenedSecret, Signed, Transcript, Upload
from protocols.secagg.unmask import OpenedSecrets, mask_remover
from protocols.tensors.planar import Reader, accumulate
from protocols.tensors.ring import Ring


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A transcript that holds: who is in the sum, and the secrets that open it."""

    listed: Listed
    opened: OpenedSecrets
    faults: Mapping[NodeId, str]  # dealers whose shares did not agree

    def remover(self, ring: Ring) -> MaskAdder:
        """Takes the remaining masks off a sum over exactly these survivors."""
        agreed = self.listed.agreed
        return mask_remover(
            agreed.ctx,
            ring,
            roster=agreed.started.attempt.roster,
            deals=agreed.deals,
            opened=self.opened,
        )


def verify_transcript(transcript: Transcript, attempt: Attempt) -> Verified:
    """Check a transcript from beginning to end.

    Args:
        attempt: as this party derived it from roster, plan and its own model; never taken from
            the transcript.

    Raises:
        NotListedError, BadSignatureError, EquivocationError, CheckFailedError, BadShareError,
        TooFewSharesError: the first step that does not hold.
    """
    started = check_start(transcript.start, attempt)  # 1
    agreed = check_deals(transcript.deals, started, transcript.checkpoint)  # 2
    check_go(transcript.go, agreed)  # 3
    listed = check_survivors(transcript.survivors, agreed)  # 4
    check_commit_certificate(transcript.certificate, listed)  # 5
    reveals = [check_reveal(signed, listed) for signed in transcript.reveals]  # 6
    found = reconstruct(reveals, listed)  # 7
    published = OpenedSecrets(
        self_seeds=_by_node(transcript.self_seeds), pair_secrets=_by_node(transcript.pair_secrets)
    )
    if published != found.opened:
        raise CheckFailedError(
            "the published secrets are not the ones that the shares give", clause="8.2"
        )
    return Verified(listed=listed, opened=found.opened, faults=found.faults)


def _by_node(secrets: tuple[OpenedSecret, ...]) -> dict[NodeId, bytes]:
    return {opened.node: opened.secret for opened in secrets}


def check_own_upload(verified: Verified, node: NodeId, header: Signed[Upload] | None) -> None:
    """A node's own part: its vector is in the sum exactly as it sent it, or not at all.

    Args:
        header: what this node signed in the attempt, or None if it uploaded nothing.

    Raises:
        CheckFailedError: the list names another upload of this node (6.2).
    """
    listed = verified.listed.headers.get(node)
    if listed is not None and (header is None or header.body != listed):
        raise CheckFailedError(f"{node} did not send what the survivor list names", clause="6.2")


def recompute_sum(
    verified: Verified,
    uploads: Mapping[NodeId, Reader],
    coordinates: int,
    ring: Ring,
    *,
    threads: int = 1,
) -> Iterator[bytes]:
    """The opened sum, packed, chunk by chunk: what the published sum must be, byte for byte.

    Args:
        uploads: readers of the masked vectors of exactly the survivors, whose roots the caller
            has checked against their headers.
        coordinates: d.

    Raises:
        CheckFailedError: the uploads are not those of the survivors.
    """
    if uploads.keys() != verified.listed.headers.keys():
        raise CheckFailedError("the uploads at hand are not those of the survivors", clause="8.2")
    return accumulate(
        [uploads[node] for node in sorted(uploads)],
        coordinates,
        ring,
        adjust=verified.remover(ring),
        threads=threads,
    )
