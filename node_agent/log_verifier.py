"""Reads the log as it grows, believes nothing, and remembers durably what held.

For each page: every leaf is verified and replayed, the root over all leaves must be the
checkpoint's, and the checkpoint must satisfy the trust policy. Only then it is kept, and only what
is kept opens a gate. A page that fails under a good signature of the log is evidence: it is stored,
and from then on nothing passes. Pages that are merely unsigned or lack a quorum are thrown away.

Which policy: a file that the site pinned, if there is one; else the witnesses that the log itself
named up to the last accepted checkpoint, as far as they are of active members by the membership
that this node verified itself. So a coordinator that brings a new set of witnesses must have the
old one cosign the checkpoint that brings them, and cannot bring strangers. At first contact the
log's own set counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from node_agent.log_store import LogStore
from policies.audit.committee import counted
from policies.audit.gate import Known, Stops
from policies.audit.replay import LeafRefusedError, Replay, Taken, witness_policy
from protocols.crypto.signatures import BadSignatureError
from protocols.errors import (
    ConfigurationError,
    CorruptStateError,
    FederationError,
    IntegrityError,
    MalformedMessageError,
)
from protocols.identifiers import NodeId, RoundId
from protocols.tlog.cosignature import open_checkpoint
from protocols.tlog.kinds import CertIssued
from protocols.tlog.leaf import BrokenChainError, Seen
from protocols.tlog.merkle import EMPTY_ROOT, leaf_hash
from protocols.tlog.note import KeyRing, VerifierKey
from protocols.tlog.proofs import BadProofError
from protocols.tlog.trust_policy import Accepted, TrustPolicy, accept_checkpoint

logger = logging.getLogger(__name__)
_LIES = (LeafRefusedError, BrokenChainError, BadProofError)


def read_policy(path: Path) -> TrustPolicy | None:
    """The policy that a site pinned; None: it did not.

    Raises:
        ConfigurationError: the file is no trust policy.
    """
    try:
        return TrustPolicy.parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, MalformedMessageError) as error:
        raise ConfigurationError(f"{path}: {error}") from None


@dataclass(slots=True)
class _Trial:
    """Leaves that were read and are not under a checkpoint yet."""

    first: int
    replay: Replay
    entries: list[bytes]
    issued: list[Taken] = field(default_factory=list)  # certificates among them


class LogVerifier:
    """What one node knows of the log. Its methods block; one thread at a time.

    Args:
        store: of this node.
        log: the log's key, from the enrolment.
        now: Unix seconds.
        pinned: the site's own trust policy.
        node: whose certificates are watched; None: nobody's.
        members: active members by the list that this node verified itself; None: it has none yet.
    """

    def __init__(
        self,
        store: LogStore,
        log: VerifierKey,
        *,
        now: Callable[[], int],
        pinned: TrustPolicy | None = None,
        node: NodeId | None = None,
        members: Callable[[], Collection[str] | None] = lambda: None,
    ) -> None:
        self._node = node
        self.members = members
        self._store = store
        self._log = log
        self._now = now
        self._pinned = pinned
        self._replay = Replay()
        self._accepted: Accepted | None = None
        # Those that the log named up to the last accepted checkpoint; None: none was accepted.
        self._witnesses: dict[str, VerifierKey] | None = None
        self._trial: _Trial | None = None
        self._load()

    def _load(self) -> None:
        for entry in self._store.entries():
            self._replay.take(entry)
        head = self._store.head()
        if head is None:
            return
        size, note = head
        opened = open_checkpoint(note, KeyRing.of([self._log]), now=2**62)
        if (size, opened.checkpoint.root) != (self._replay.size, self._replay.root):
            raise CorruptStateError("the kept leaves are not those of the kept checkpoint")
        policy = self._policy_of(self._replay)
        self._witnesses = dict(self._replay.witnesses)
        opened = open_checkpoint(note, policy.ring, now=2**62)
        by_key = {signature.key: signature.time for signature in opened.cosignatures}
        times = {
            name: time
            for name, key in policy.witnesses.items()
            if (time := by_key.get(key)) is not None
        }
        self._accepted = Accepted(opened=opened, times=times)

    # -- what is known -------------------------------------------------------------------------

    @property
    def origin(self) -> str:
        """Of the log."""
        return self._log.name

    @property
    def size(self) -> int:
        """Leaves that are verified and kept."""
        return self._replay.size

    @property
    def expects(self) -> int:
        """The index of the next leaf to read."""
        return self._trial.replay.size if self._trial else self._replay.size

    @property
    def seen(self) -> Seen:
        """The last accepted checkpoint, for this node's own leaves."""
        size = self._replay.size
        return Seen(size=size, root=self._replay.root if size else EMPTY_ROOT)

    @property
    def log(self) -> Replay:
        """The verified log; not to be changed."""
        return self._replay

    def known(self) -> Known | None:
        """For the gate; None: nothing was accepted yet."""
        policy = self._policy_in_force()
        if self._accepted is None or policy is None:
            return None
        alarm = self._store.alarm()
        return Known(
            log=self._replay,
            policy=policy,
            cosigned=self._accepted.times,
            alarm=Stops(*alarm) if alarm else None,
            undelivered=self._store.missing(),
        )

    def bound_checkpoint(self, round_: RoundId, attempt: int) -> bytes | None:
        """What an attempt's secure sum is bound to; None: its start was not seen yet."""
        return self._replay.bound_checkpoint(round_, attempt)

    # -- reading on ----------------------------------------------------------------------------

    def forget_trial(self) -> None:
        """Read on from what is kept: for a new connection."""
        self._trial = None

    def take(self, first: int, entries: Sequence[bytes], checkpoint: bytes) -> bool:
        """Take a page. Returns whether a checkpoint was accepted with it.

        Args:
            first: index of the first leaf; what is known already is not to come again.
            entries: leaves.
            checkpoint: empty while more leaves follow.

        Raises:
            IntegrityError, MalformedMessageError: nothing of it was kept. Where the log's own
                signature stands under it, an alarm was raised.
        """
        trial = self._trial or _Trial(self._replay.size, self._replay.copy(), [])
        try:
            if first != trial.replay.size:
                raise MalformedMessageError(f"leaf {first} came where {trial.replay.size} is due")
            for entry in entries:
                taken = trial.replay.take(entry)
                trial.entries.append(entry)
                if isinstance(taken.said, CertIssued):
                    trial.issued.append(taken)
            if not checkpoint:
                self._trial = trial
                return False
            accepted = self._check(trial.replay, checkpoint)
        except (IntegrityError, MalformedMessageError) as error:
            self._trial = None
            self._suspect(error, entries, checkpoint)
            raise
        mine = self._store.own_hashes()
        from_us = [found for found in _hashes(trial.entries) if found in mine]
        self._store.accept(trial.first, trial.entries, trial.replay.size, checkpoint, from_us)
        self._replay, self._accepted, self._trial = trial.replay, accepted, None
        self._watch(trial.issued, mine, checkpoint)
        # From here on, whoever the log names now must vouch for what comes next.
        self._witnesses = dict(self._replay.witnesses)
        return True

    def _check(self, replay: Replay, checkpoint: bytes) -> Accepted:
        policy = self._policy_in_force() or self._policy_of(replay)
        # First what the log alone vouches for: a wrong root under its signature is evidence.
        head = open_checkpoint(checkpoint, KeyRing.of([self._log]), now=self._now()).checkpoint
        if (head.size, head.root) != (replay.size, replay.root):
            raise BadProofError(
                f"the checkpoint of size {head.size} is not over the {replay.size} leaves read"
            )
        accepted = accept_checkpoint(policy, checkpoint, now=self._now())
        return self._times(replay, accepted)

    def _times(self, replay: Replay, accepted: Accepted) -> Accepted:
        """The cosignatures by the names of the policy that is in force from now on."""
        policy = self._policy_of(replay)
        opened = open_checkpoint(accepted.opened.note.to_bytes(), policy.ring, now=self._now())
        by_key = {signature.key: signature.time for signature in opened.cosignatures}
        times = {
            name: time
            for name, key in policy.witnesses.items()
            if (time := by_key.get(key)) is not None
        }
        return Accepted(opened=opened, times=times)

    def demanded(self) -> int:
        """How many witnesses must cosign at least before this node believes a checkpoint."""
        policy = self._policy_in_force() or self._policy_of(self._replay)
        return policy.least_cosigners()

    def auditors(self) -> int:
        """How many of them are no members: the log names them in its first leaf."""
        genesis = self._replay.genesis
        return len(genesis.witnesses) if genesis is not None else 0

    def _policy_in_force(self) -> TrustPolicy | None:
        """By the witnesses of the last accepted checkpoint; None: none was accepted."""
        if self._witnesses is None:
            return None
        return self._pinned or self._policy_over(self._replay, self._witnesses)

    def _policy_of(self, replay: Replay) -> TrustPolicy:
        return self._pinned or self._policy_over(replay, replay.witnesses)

    def _policy_over(self, replay: Replay, nodes: Mapping[str, VerifierKey]) -> TrustPolicy:
        auditors = replay.genesis.witnesses if replay.genesis else ()
        keys = [VerifierKey.parse(vkey) for vkey in auditors]
        return witness_policy(self._log, counted(nodes, self.members()), keys)

    def _watch(self, issued: Sequence[Taken], mine: Collection[str], checkpoint: bytes) -> None:
        """Raise an alarm on a certificate for this node that it did not ask for.

        Whoever holds the authority's key could be this node for the others; the log shows it.
        Certificates from before this node's first own request are not its business: an earlier
        folder of the same institution may have asked for them.
        """
        own = [seen.index for leaf, seen in self._replay.requests.items() if leaf in mine]
        for taken in issued:
            said = taken.said
            if not isinstance(said, CertIssued) or self._node is None or not own:
                continue
            ours = said.uri.endswith(f"/inst/{self._node}/node/1")
            if ours and taken.index > min(own) and said.request not in mine:
                why = (
                    f"leaf {taken.index} certifies a key for {self._node} that this node did not "
                    "ask for: somebody may be speaking in its name"
                )
                logger.error("%s", why)
                evidence = len(taken.leaf.entry).to_bytes(4, "big") + taken.leaf.entry + checkpoint
                self._store.raise_alarm("log.certificate", why, evidence, self._now())

    def _suspect(self, error: FederationError, entries: Sequence[bytes], checkpoint: bytes) -> None:
        """Raise an alarm where the log itself signed what does not hold."""
        if not isinstance(error, _LIES) or not checkpoint:
            return
        try:
            open_checkpoint(checkpoint, KeyRing.of([self._log]), now=self._now())
        except (BadSignatureError, MalformedMessageError):
            return
        rule = error.rule if isinstance(error, LeafRefusedError) else f"log.{error.code}"
        evidence = b"".join(len(e).to_bytes(4, "big") + e for e in (checkpoint, *entries))
        logger.error("the round log does not hold: %s", error)
        self._store.raise_alarm(rule, str(error)[:400], evidence, self._now())


def _hashes(entries: Sequence[bytes]) -> list[str]:
    return [leaf_hash(entry).hex() for entry in entries]
