"""A log must not sign two histories: what is checked before a checkpoint is signed.

A restored backup of the database is a valid, shorter log, and the next signature would fork it. So
the last signed head is kept outside the database, and the witnesses are asked at start: both know
sizes that the backup has forgotten. Deciding is here; keeping the file and asking are elsewhere.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence

from protocols.errors import IntegrityError
from protocols.tlog.checkpoint import Checkpoint
from protocols.tlog.merkle import EMPTY_ROOT
from protocols.tlog.proofs import BadProofError, verify_consistency


class ForkError(IntegrityError):
    """Signing would put two histories of one log into the world."""

    code = "log_fork"
    advice = (
        "Do not delete the ratchet. The database is older than what was signed: restore a newer "
        "one, or close this log and open a new shard with a new key."
    )


def check_may_sign(last: Checkpoint | None, new: Checkpoint, proof: Sequence[bytes]) -> None:
    """Check ``new`` against the last head that was signed.

    Args:
        last: from outside the database; None only where nothing was ever signed.
        new: what is about to be signed.
        proof: consistency from ``last`` to ``new``; empty from size 0 and between equal sizes.

    Raises:
        ForkError: another origin, a smaller tree, or one that does not begin with ``last``.
    """
    if new.size == 0 and not hmac.compare_digest(new.root, EMPTY_ROOT):
        raise ForkError("an empty log has one root only")
    if last is None:
        return
    if last.origin != new.origin:
        raise ForkError(f"the ratchet is that of {last.origin}, not of {new.origin}")
    if new.size < last.size:
        raise ForkError(f"size {last.size} was signed, the log now has {new.size}")
    if last.size == 0:
        return
    try:
        verify_consistency(
            old=last.size,
            old_root=last.root,
            new=new.size,
            new_root=new.root,
            proof=proof,
        )
    except BadProofError as error:
        raise ForkError(f"the log does not extend what was signed: {error}") from None


def check_start(own: Checkpoint, witnessed: Iterable[Checkpoint], *, need: int) -> None:
    """Check the log's own head against what witnesses cosigned, before it signs again.

    Args:
        own: the head of the database.
        witnessed: one verified checkpoint of this origin for each witness that answered.
        need: how many must have answered; the quorum.

    Raises:
        ForkError: too few answers, a larger size, or another root at the same size.
    """
    heads = list(witnessed)
    if len(heads) < need:
        raise ForkError(f"{len(heads)} witnesses answered, {need} are needed to start")
    for head in heads:
        if head.origin != own.origin:
            raise ForkError(f"a witness spoke of {head.origin}, not of {own.origin}")
        if head.size > own.size:
            raise ForkError(f"a witness has seen size {head.size}, the log now has {own.size}")
        if head.size == own.size and not hmac.compare_digest(head.root, own.root):
            raise ForkError(f"a witness has seen another root at size {own.size}")
