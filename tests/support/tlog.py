"""Vectors of the round log, a reference by recursion, and a small world of keys."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from protocols.tlog.checkpoint import Checkpoint, sign_checkpoint
from protocols.tlog.cosignature import cosign
from protocols.tlog.note import KeyType, Note, SignerKey
from protocols.tlog.proofs import SubtreeHashes, root_of, stored

DATA = Path(__file__).resolve().parents[1] / "unit" / "data"
NOW = 1_790_000_000  # Unix seconds: the time of the vectors' cosignatures


@cache
def formats() -> Any:
    return json.loads((DATA / "tlog_formats.json").read_text("utf-8"))


@cache
def witness_vectors() -> Any:
    return json.loads((DATA / "tlog_witness.json").read_text("utf-8"))


def b64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


# -- RFC 6962 word by word: slow, recursive, and nothing of ours in it ---------------------------


def _k(n: int) -> int:
    k = 1
    while 2 * k < n:
        k *= 2
    return k


def mth(entries: list[bytes]) -> bytes:
    """MTH(D[n])."""
    if not entries:
        return hashlib.sha256(b"").digest()
    if len(entries) == 1:
        return hashlib.sha256(b"\x00" + entries[0]).digest()
    k = _k(len(entries))
    return hashlib.sha256(b"\x01" + mth(entries[:k]) + mth(entries[k:])).digest()


def path(m: int, entries: list[bytes]) -> list[bytes]:
    """PATH(m, D[n])."""
    if len(entries) == 1:
        return []
    k = _k(len(entries))
    if m < k:
        return [*path(m, entries[:k]), mth(entries[k:])]
    return [*path(m - k, entries[k:]), mth(entries[:k])]


def proof(m: int, entries: list[bytes], whole: bool = True) -> list[bytes]:
    """SUBPROOF(m, D[n], b)."""
    if m == len(entries):
        return [] if whole else [mth(entries)]
    k = _k(len(entries))
    if m <= k:
        return [*proof(m, entries[:k], whole), mth(entries[k:])]
    return [*proof(m - k, entries[k:], False), mth(entries[:k])]


def entries_of(size: int) -> list[bytes]:
    return [b"leaf %d" % i for i in range(size)]


@cache
def big_tree() -> SubtreeHashes:
    """70,000 leaves ``leaf <i>``, hashed once for all tests."""
    return stored([hashlib.sha256(b"\x00leaf %d" % i).digest() for i in range(70_000)])


# -- a log and four witnesses --------------------------------------------------------------------

ORIGIN = "log.minga.example/test"
LOG = SignerKey(name=ORIGIN, type=KeyType.ED25519, seed=b"\x21" * 32)
WITNESSES = {
    f"w{i}": SignerKey(
        name=f"witness.m{i}.example/w1",
        type=KeyType.ED25519_COSIGNATURE,
        seed=bytes([0x30 + i]) * 32,
    )
    for i in range(1, 5)
}


def policy_text(quorum: str = "group committee 3 w1 w2 w3 w4\nquorum committee\n") -> bytes:
    lines = [f"log {LOG.verifier.to_text()}\n"]
    lines += [f"witness {name} {key.verifier.to_text()}\n" for name, key in WITNESSES.items()]
    return ("".join(lines) + quorum).encode()


def head_of(size: int, origin: str = ORIGIN) -> Checkpoint:
    return Checkpoint(origin=origin, size=size, root=root_of(big_tree(), size))


def signed(size: int, *witnesses: str, time: int = NOW) -> Note:
    """The checkpoint at ``size``, cosigned by the witnesses that are named."""
    note = sign_checkpoint(head_of(size), LOG)
    lines = tuple(cosign(note.text, signer=WITNESSES[w], time=time) for w in witnesses)
    return Note(text=note.text, signatures=note.signatures + lines)
