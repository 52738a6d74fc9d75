"""The questions about the log itself: rewritten, two-faced, with gaps."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from policies.audit.evidence import Evidence
from policies.audit.records import Record, Result
from protocols.tlog.kinds import Heartbeat, LogClosed

HEARTBEAT_S = 3600  # how long a log may be silent; our rule
SLACK_S = 600


def q17_rewritten(evidence: Evidence) -> Iterator[Record]:
    """Every checkpoint is one of this tree, and a quorum of witnesses vouches for the last."""
    first = evidence.first
    heads = evidence.tree.heads
    if first is not None:
        leaves = tuple(range(first.first, max(first.stop, first.first)))[:100]
        reason = f"{first.place}: {first.reason}"
        yield Record(id="17", round=None, result=Result.FAIL, leaves=leaves, reason=reason)
        return
    kept = len({head.size for head in heads})
    reason = f"{kept} checkpoints with a quorum, all of one tree of {evidence.tree.size} leaves"
    if evidence.tree.without_quorum:
        reason += f"; {evidence.tree.without_quorum} older ones agree without this quorum"
    result = Result.PASS
    if evidence.tree.unwitnessed:
        result, reason = Result.UNKNOWN, f"{reason}; the trust policy asks for no witness"
    elif not evidence.anchored:
        result = Result.UNKNOWN
        reason += "; unanchored: the keys of log and witnesses were found beside the log"
    yield Record(id="17", round=None, result=result, leaves=(), reason=reason)


def q18_gaps(evidence: Evidence) -> Iterator[Record]:
    """Nothing is silent for longer than the log's heartbeat.

    A gap is no proof of anything: a coordinator may have been down. It is time for which no leaf
    and no witness vouches, so it is unknown, with its bounds.
    """
    intervals = [
        taken.said.interval_s
        for taken in evidence.of(Heartbeat)
        if isinstance(taken.said, Heartbeat)
    ]
    most = max(intervals, default=HEARTBEAT_S) + SLACK_S
    times = [
        (int(taken.statement.time.timestamp()), taken.index)
        for taken in evidence.taken
        if taken.holder.role == "coordinator"
    ]
    found = 0
    for index, reason in _against_policy(evidence):
        found += 1
        yield Record(id="18", round=None, result=Result.FAIL, leaves=(index,), reason=reason)
    for (before, _), (after, index) in pairwise(times):
        if after - before > most:
            found += 1
            reason = f"no leaf of the coordinator for {after - before} s before leaf {index}"
            yield Record(id="18", round=None, result=Result.UNKNOWN, leaves=(index,), reason=reason)
    if not found:
        closed = any(isinstance(taken.said, LogClosed) for taken in evidence.taken)
        reason = f"never silent for more than {most} s" + ("; the log is closed" if closed else "")
        yield Record(id="18", round=None, result=Result.PASS, leaves=(), reason=reason)


def _against_policy(evidence: Evidence) -> Iterator[tuple[int, str]]:
    """What the signed policy says of the log, and the log does otherwise."""
    for taken in evidence.taken:
        policy = None
        if isinstance(taken.said, Heartbeat):
            policy = evidence.policy_at(taken.index)
            if policy is not None and taken.said.interval_s > policy.log.heartbeat_s:
                said = f"a heartbeat every {taken.said.interval_s} s"
                yield taken.index, f"{said}; the policy asks for {policy.log.heartbeat_s}"
