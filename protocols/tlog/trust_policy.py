"""Trust policies: which log is ours, and which witnesses are enough (C2SP tlog-policy).

    log log.minga.example/rounds/2026+<id>+<key>
    witness w1 witness.m1.example/w1+<id>+<key> https://w1.example/
    group committee 3 w1 w2 w3 w4
    group g all committee auditor
    quorum g

Names are defined before they are used and stand in at most one group, so that no witness counts
twice. The file comes from outside the log that it judges. Our parser is stricter than some: one
raw key cannot stand twice, log keys are of type 0x01, witness keys of type 0x04 (0x06 by a flag).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from protocols.errors import IntegrityError, MalformedMessageError
from protocols.tlog.cosignature import OpenedCheckpoint, open_checkpoint
from protocols.tlog.note import KeyRing, KeyType, VerifierKey
from protocols.tlog.text import decode_decimal, decode_utf8

MAX_POLICY: Final = 1_000_000  # bytes
NONE: Final = "none"
CHECKPOINT_S: Final = 60  # a leaf is under a checkpoint within so many seconds
FRESH_S: Final = 24 * 3600  # a quorum older than this may be a frozen view: no new round


class QuorumError(IntegrityError):
    """A checkpoint has too few cosignatures for the trust policy, or too old ones."""

    code = "no_quorum"
    advice = "The round waits. If it lasts, ask the operator which witnesses are down."


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Satisfied when at least ``threshold`` of the members are."""

    threshold: int  # members; 1 to all
    members: tuple[str, ...]  # witnesses and groups


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustPolicy:
    """A parsed trust policy."""

    logs: tuple[VerifierKey, ...]
    witnesses: Mapping[str, VerifierKey]  # by the name in the policy, not that of the key
    groups: Mapping[str, Group]  # in the order of definition: members come before
    quorum: str | None  # None: no cosignature is needed ("quorum none")

    @classmethod
    def parse(cls, data: bytes, *, ml_dsa: bool = False) -> TrustPolicy:
        """Read a policy file.

        Raises:
            MalformedMessageError: with the number of the line.
        """
        if len(data) > MAX_POLICY:
            raise MalformedMessageError(f"a trust policy of more than {MAX_POLICY} bytes")
        # A tab is the one control character that this format has.
        text = decode_utf8(data.replace(b"\t", b" "), "the trust policy")
        if not text.endswith("\n"):
            raise MalformedMessageError("the trust policy does not end in a newline")
        reader = _Reader(ml_dsa=ml_dsa)
        for number, line in enumerate(text.split("\n"), 1):
            fields = [part for part in line.split(" ") if part]
            if not fields or fields[0].startswith("#"):
                continue
            try:
                reader.take(fields)
            except MalformedMessageError as error:
                raise MalformedMessageError(f"trust policy, line {number}: {error}") from None
        return reader.finish()

    @property
    def ring(self) -> KeyRing:
        """The keys of all logs and witnesses."""
        return KeyRing.of((*self.logs, *self.witnesses.values()))

    def least_cosigners(self) -> int:
        """The smallest number of witnesses whose cosignatures can be enough."""
        if self.quorum is None:
            return 0
        need = dict.fromkeys(self.witnesses, 1)
        for name, group in self.groups.items():  # members come before
            need[name] = sum(sorted(need[member] for member in group.members)[: group.threshold])
        return need[self.quorum]

    def satisfied(self, names: AbstractSet[str]) -> bool:
        """Whether cosignatures by the witnesses ``names`` (names of the policy) are enough."""
        if self.quorum is None:
            return True
        met = {name for name in names if name in self.witnesses}
        for name, group in self.groups.items():
            if len(met.intersection(group.members)) >= group.threshold:
                met.add(name)
        return self.quorum in met


class _Reader:
    """What has been defined so far."""

    def __init__(self, *, ml_dsa: bool) -> None:
        self._ml_dsa = ml_dsa
        self._logs: list[VerifierKey] = []
        self._witnesses: dict[str, VerifierKey] = {}
        self._groups: dict[str, Group] = {}
        self._used: set[str] = set()  # members of groups
        self._quorum: str | None = None

    def take(self, fields: list[str]) -> None:
        match fields:
            case ["log", vkey, *url]:
                self._logs.append(self._key(vkey, url, (KeyType.ED25519,)))
            case ["witness", name, vkey, *url]:
                cosigning = (KeyType.ED25519_COSIGNATURE, KeyType.ML_DSA_44_COSIGNATURE)
                self._new(name)
                self._witnesses[name] = self._key(vkey, url, cosigning)
            case ["group", name, threshold, *members]:
                self._new(name)
                self._groups[name] = self._group(threshold, members)
            case ["quorum", name]:
                if self._quorum is not None:
                    raise MalformedMessageError("a second quorum line")
                if name != NONE:
                    self._known(name)
                self._quorum = name
            case _:
                raise MalformedMessageError(
                    f"not a line of a trust policy: {' '.join(fields)!r:.80}"
                )

    def _key(self, vkey: str, url: list[str], types: tuple[KeyType, ...]) -> VerifierKey:
        if len(url) > 1 or not all(_is_url(each) for each in url):
            raise MalformedMessageError("after the key comes one URL or nothing")
        key = VerifierKey.parse(vkey, ml_dsa=self._ml_dsa)
        if key.type not in types:
            raise MalformedMessageError(
                f"a key of type {key.type:#04x} cannot be used here: {key.name}"
            )
        return key

    def _new(self, name: str) -> None:
        if name == NONE or name.startswith("#"):
            raise MalformedMessageError(f"nothing can be named {name!r:.80}")
        if name in self._witnesses or name in self._groups:
            raise MalformedMessageError(f"{name!r:.80} is defined twice")

    def _known(self, name: str) -> None:
        if name not in self._witnesses and name not in self._groups:
            raise MalformedMessageError(f"{name!r:.80} is not defined before this line")

    def _group(self, threshold: str, members: list[str]) -> Group:
        for name in members:
            self._known(name)
            if name in self._used:
                raise MalformedMessageError(f"{name!r:.80} is a member twice")
            self._used.add(name)
        if not members:  # all of nothing would allow everything
            raise MalformedMessageError("a group without members")
        match threshold:
            case "all":
                least = len(members)
            case "any":
                least = 1
            case _:
                least = decode_decimal(threshold, "the threshold")
        if not 1 <= least <= len(members):
            raise MalformedMessageError(f"a threshold of {least} for {len(members)} members")
        return Group(threshold=least, members=tuple(members))

    def finish(self) -> TrustPolicy:
        if self._quorum is None:
            raise MalformedMessageError("the trust policy has no quorum line")
        policy = TrustPolicy(
            logs=tuple(self._logs),
            witnesses=MappingProxyType(self._witnesses),
            groups=MappingProxyType(self._groups),
            quorum=None if self._quorum == NONE else self._quorum,
        )
        _ = policy.ring  # no raw key twice, no two keys with one name and id
        return policy


def _is_url(text: str) -> bool:
    return text.isascii() and text.startswith(("https://", "http://"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A checkpoint that satisfies a trust policy: who cosigned it when, as evidence."""

    opened: OpenedCheckpoint
    times: Mapping[str, int]  # Unix seconds by the policy's name of the witness


def accept_checkpoint(
    policy: TrustPolicy, data: bytes, *, now: int, fresh_s: int | None = None
) -> Accepted:
    """Verify a checkpoint under a trust policy.

    1. It parses. 2. No configured key's signature is bad. 3. A log of the policy signed it, under
    the key that is named like its origin. 4. The witnesses that cosigned it are enough. 5. With
    ``fresh_s``, those of the last ``fresh_s`` seconds alone are. The caller still owes consistency
    with the last checkpoint it accepted.

    Raises:
        MalformedMessageError: step 1.
        BadSignatureError: steps 2 and 3.
        QuorumError: steps 4 and 5.
    """
    opened = open_checkpoint(data, policy.ring, now=now)
    by_key = {signature.key: signature.time for signature in opened.cosignatures}
    times = {
        name: time
        for name, key in policy.witnesses.items()
        if (time := by_key.get(key)) is not None
    }
    what = f"the checkpoint of {opened.checkpoint.origin} at size {opened.checkpoint.size}"
    if not policy.satisfied(times.keys()):
        raise QuorumError(f"{what} has {_list(times)}, not a quorum")
    if fresh_s is not None:
        recent = {name for name, time in times.items() if time >= now - fresh_s}
        if not policy.satisfied(recent):
            raise QuorumError(f"{what} has no quorum of the last {fresh_s} s: {_list(recent)}")
    return Accepted(opened=opened, times=MappingProxyType(times))


def _list(names: Iterable[str]) -> str:
    return f"cosignatures by {', '.join(sorted(names)) or 'nobody'}"


def least_quorum(witnesses: int) -> int:
    """1 + floor(2n/3): the least k of n that makes a split view impossible if k are honest.

    Raises:
        ValueError: no witness.
    """
    if witnesses < 1:
        raise ValueError("a quorum needs a witness")
    return 1 + 2 * witnesses // 3


def split_view_is_impossible(*, witnesses: int, honest: int, quorum: int) -> bool:
    """k > n - ceil(m/2): two quorums then share an honest witness, which signs one branch only."""
    return quorum > witnesses - (honest + 1) // 2
