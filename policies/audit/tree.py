"""Whether the entries are those that log and witnesses signed: the tree, before any leaf is read.

    1. The checkpoint parses, the log signed it, the witnesses of the trust policy are a quorum.
    2. There are as many entries as it says.
    3. Every entry has the hash that stands for it in the tiles, and the tiles follow from those.
    4. The root of the entries is the checkpoint's.
    5. Every archived checkpoint is as good, and the entries begin with the tree that it names.

The caller has read the files; nothing in them was believed. What cannot be seen from one copy: that
another copy differs where no witness, node or archive remembers it, or that leaves came later.
"""

from __future__ import annotations

import hmac
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate

from policies.audit.records import Fault
from protocols.errors import IntegrityError, MalformedMessageError, RefusedError
from protocols.tlog.checkpoint import Checkpoint
from protocols.tlog.merkle import leaf_hash
from protocols.tlog.note import Note
from protocols.tlog.proofs import SubtreeHashes, root_of, stored
from protocols.tlog.trust_policy import Accepted, QuorumError, TrustPolicy, accept_checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFiles:
    """What a copy of a log holds."""

    checkpoint: bytes
    archive: Mapping[int, bytes]  # size in the file's name -> checkpoint
    entries: Sequence[bytes]  # as many as could be read, from 0
    row: Sequence[bytes]  # hashes of the tiles of level 0, as many as there are
    torn: tuple[Fault, ...] = ()  # bundles and tiles that could not be read, or do not follow


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A checkpoint that satisfies the trust policy."""

    size: int
    root: bytes
    earliest: int  # Unix seconds: when the first of its witnesses cosigned it
    quorum_at: int  # Unix seconds: when they were a quorum; 0 where the policy asks for none


@dataclass(frozen=True, slots=True)
class Times:
    """Witnessed times by size, so that the bounds of a leaf are found by halving."""

    sizes: tuple[int, ...]  # of heads with a quorum, ascending
    latest: tuple[int, ...]  # of this head and all smaller ones, Unix seconds
    earliest: tuple[int, ...]  # of this head and all larger ones

    @classmethod
    def of(cls, heads: Sequence[Head]) -> Times:
        """Of heads in ascending order."""
        known = [head for head in heads if head.quorum_at]
        times = [head.quorum_at for head in known]
        return cls(
            sizes=tuple(head.size for head in known),
            latest=tuple(accumulate(times, max)),
            earliest=tuple(reversed(list(accumulate(reversed(times), min)))),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """The tree of the entries and what was found about it."""

    origin: str
    size: int  # of the checkpoint, or of the entries where it cannot be read
    hashes: Sequence[bytes]  # leaf hashes of the entries
    heads: tuple[Head, ...]  # good checkpoints whose tree the entries have, ascending
    times: Times
    faults: tuple[Fault, ...]
    unwitnessed: bool  # the trust policy asks for no cosignature
    without_quorum: int  # archived checkpoints that agree, but lack this trust policy's quorum
    subtrees: SubtreeHashes = field(repr=False)
    root: Callable[[int], bytes] = field(repr=False)  # of the first so many entries

    def written_between(self, index: int) -> tuple[int | None, int | None]:
        """Bounds on the time at which the leaf came into the log, Unix seconds, from witnesses.

        None: nothing bounds it on that side.
        """
        at = bisect_right(self.times.sizes, index)
        before = self.times.latest[at - 1] if at else None
        after = self.times.earliest[at] if at < len(self.times.earliest) else None
        return before, after


def check_tree(files: LogFiles, policy: TrustPolicy, *, now: int) -> Tree:
    """Check a copy against the trust policy; every fault is reported, none raised.

    Args:
        now: Unix seconds: a cosignature far ahead of it is refused.
    """
    hashes = [leaf_hash(entry) for entry in files.entries]
    subtrees = stored(hashes)
    faults = list(files.torn)
    faults += [
        Fault.at("tile", index, f"entry {index} does not have the hash that the tile has for it")
        for index, (found, kept) in enumerate(zip(hashes, files.row, strict=False))
        if not hmac.compare_digest(found, kept)
    ]
    heads: list[Head] = []
    early = 0
    origin, size = "", len(hashes)
    for at, data in sorted([*files.archive.items(), (2**63, files.checkpoint)]):
        latest = at == 2**63
        what = "the checkpoint" if latest else f"the archived checkpoint of size {at}"
        good = max((head.size for head in heads), default=0)
        stated = _stated(data)
        if latest and stated is not None:
            origin, size = stated.origin, stated.size
        stop = max(good, stated.size if stated else len(hashes))
        try:
            accepted = accept_checkpoint(policy, data, now=now)
        except QuorumError as error:
            # An old head may be from before the committee of today. The log signed it, so its
            # tree must be this one; of times and witnesses it says nothing.
            if not latest and stated is not None and _is_prefix(subtrees, hashes, stated):
                early += 1
                continue
            faults.append(Fault(check="quorum", first=good, stop=stop, reason=f"{what}: {error}"))
            continue
        except (MalformedMessageError, IntegrityError, RefusedError) as error:
            faults.append(
                Fault(check="checkpoint", first=good, stop=stop, reason=f"{what}: {error}")
            )
            continue
        head = accepted.opened.checkpoint
        if not latest and head.size != at:
            faults.append(
                Fault(check="checkpoint", first=good, stop=stop, reason=f"{what} is of {head.size}")
            )
            continue
        if head.size > len(hashes):
            reason = f"{what} covers {head.size} leaves, {len(hashes)} are here"
            faults.append(Fault.at("missing", len(hashes), reason))
            continue
        if not hmac.compare_digest(root_of(subtrees, head.size), head.root):
            reason = f"{what} was signed for other leaves than these"
            faults.append(Fault(check="root", first=good, stop=max(stop, good), reason=reason))
            continue
        heads.append(_head(policy, accepted))
    if len(hashes) > size:
        faults.append(Fault.at("extra", size, f"there are entries behind the {size} of the log"))
    ascending = tuple(sorted(heads, key=lambda head: (head.size, head.quorum_at)))
    return Tree(
        origin=origin,
        size=size,
        hashes=hashes,
        heads=ascending,
        times=Times.of(ascending),
        faults=tuple(faults),
        unwitnessed=policy.quorum is None,
        without_quorum=early,
        subtrees=subtrees,
        root=lru_cache(maxsize=4096)(partial(root_of, subtrees)),
    )


def _stated(data: bytes) -> Checkpoint | None:
    """What a checkpoint says, whoever signed it."""
    try:
        return Checkpoint.parse(Note.parse(data).text)
    except MalformedMessageError:
        return None


def _is_prefix(subtrees: SubtreeHashes, hashes: Sequence[bytes], head: Checkpoint) -> bool:
    return head.size <= len(hashes) and hmac.compare_digest(root_of(subtrees, head.size), head.root)


def _head(policy: TrustPolicy, accepted: Accepted) -> Head:
    checkpoint = accepted.opened.checkpoint
    times = sorted(accepted.times.values())
    return Head(
        size=checkpoint.size,
        root=checkpoint.root,
        earliest=times[0] if times else 0,
        quorum_at=_quorum_at(policy, accepted),
    )


def _quorum_at(policy: TrustPolicy, accepted: Accepted) -> int:
    """The moment at which the cosignatures became a quorum."""
    if policy.quorum is None:
        return 0
    met: set[str] = set()
    for name, time in sorted(accepted.times.items(), key=lambda item: item[1]):
        met.add(name)
        if policy.satisfied(met):
            return time
    return 0
