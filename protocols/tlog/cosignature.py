"""Cosignatures: what a witness says about a checkpoint (C2SP tlog-cosignature v1.0.1).

"At this time, this was the largest tree consistent with all before it that I have seen for this
origin." Type 0x04 is the one in use:

    blob    = u64be time || 64-byte Ed25519 signature
    message = "cosignature/v1\\ntime <time>\\n" || text of the checkpoint

The message does not name the cosigner, so a key belongs to one cosigner and one use (``KeyRing``).
Type 0x06, ML-DSA-44, is verified only with keys that were configured with ``ml_dsa=True``; by
default such keys cannot be configured, and their lines are ignored like those of any stranger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PublicKey

from protocols.crypto.signatures import BadSignatureError
from protocols.errors import MalformedMessageError
from protocols.tlog.checkpoint import Checkpoint
from protocols.tlog.note import (
    GoodSignature,
    KeyRing,
    KeyType,
    Note,
    SignatureLine,
    SignerKey,
    VerifierKey,
    check_ed25519,
    open_note,
    verify_plain,
)

MAX_TIME: Final = 2**63 - 1  # Unix seconds
MAX_AHEAD_S: Final = 300  # how far a witness's clock may be ahead of ours; our rule
_TIME_BYTES: Final = 8
_ML_DSA_44_SIGNATURE: Final = 2420  # bytes


def signed_message(text: str, time: int) -> bytes:
    """What a cosignature of type 0x04 signs."""
    return f"cosignature/v1\ntime {time}\n{text}".encode()


def signed_message_ml_dsa(checkpoint: Checkpoint, time: int, cosigner: str) -> bytes:
    """What a cosignature of type 0x06 signs: it names the cosigner, and the whole tree from 0."""
    name, origin = cosigner.encode(), checkpoint.origin.encode()
    return b"".join(
        (
            b"subtree/v1\n\x00",
            bytes([len(name)]) + name,
            time.to_bytes(8, "big"),
            bytes([len(origin)]) + origin,
            (0).to_bytes(8, "big"),
            checkpoint.size.to_bytes(8, "big"),
            checkpoint.root,
        )
    )


def cosign(text: str, *, signer: SignerKey, time: int) -> SignatureLine:
    """Cosign the text of a checkpoint. Only after ``witness.add_checkpoint`` allowed it.

    Raises:
        ValueError: the key is not of type 0x04, or the time is 0, negative or beyond 2**63-1.
    """
    if signer.type is not KeyType.ED25519_COSIGNATURE:
        raise ValueError("a witness cosigns with a key of type 0x04")
    if not 0 < time <= MAX_TIME:
        raise ValueError("the time of a cosignature is 1 to 2**63-1")
    blob = time.to_bytes(_TIME_BYTES, "big") + signer.sign(signed_message(text, time))
    return SignatureLine(name=signer.name, key_id=signer.verifier.key_id, blob=blob)


def verify_cosignature(key: VerifierKey, text: str, blob: bytes, *, now: int) -> int:
    """Check a cosignature; return its time, Unix seconds.

    Args:
        key: of type 0x04 or 0x06.
        text: the text of the checkpoint.
        blob: what follows the key id in the line.
        now: Unix seconds.

    Raises:
        BadSignatureError: it does not verify, or its time is 0, beyond 2**63-1, or more than
            five minutes ahead.
    """
    time = int.from_bytes(blob[:_TIME_BYTES], "big")
    signature = blob[_TIME_BYTES:]
    if key.type is KeyType.ED25519_COSIGNATURE:
        check_ed25519(key.public_key, signed_message(text, time), signature, key.name)
    elif key.type is KeyType.ML_DSA_44_COSIGNATURE:
        _check_ml_dsa(key, text, time, signature)
    else:
        raise BadSignatureError(f"the key of {key.name} is not for cosignatures")
    if not 0 < time <= MAX_TIME:
        raise BadSignatureError(f"the cosignature of {key.name} has no usable time")
    if time > now + MAX_AHEAD_S:
        raise BadSignatureError(
            f"the cosignature of {key.name} is {time - now} s ahead of the clock here"
        )
    return time


def _check_ml_dsa(key: VerifierKey, text: str, time: int, signature: bytes) -> None:
    try:
        checkpoint = Checkpoint.parse(text, foreign=True)
    except MalformedMessageError:
        raise BadSignatureError(f"{key.name} cosigned what is not a checkpoint") from None
    if len(signature) != _ML_DSA_44_SIGNATURE:
        raise BadSignatureError(f"the signature of {key.name} does not have 2420 bytes")
    message = signed_message_ml_dsa(checkpoint, time, key.name)
    try:
        MLDSA44PublicKey.from_public_bytes(key.public_key).verify(signature, message)
    except InvalidSignature:
        raise BadSignatureError(f"the signature of {key.name} does not verify") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedCheckpoint:
    """A checkpoint that its log signed, and who cosigned it."""

    checkpoint: Checkpoint
    note: Note
    log: VerifierKey
    cosignatures: tuple[GoodSignature, ...]  # each key once, with its latest time


def open_checkpoint(
    data: bytes, ring: KeyRing, *, now: int, foreign: bool = False
) -> OpenedCheckpoint:
    """Verify a checkpoint: 1. it parses, 2. no configured key's line is bad, 3. its log signed it.

    The log is the configured key of type 0x01 whose name is the origin. Whether the cosignatures
    are enough is for the caller: ``trust_policy``.

    Args:
        data: a note.
        ring: keys of logs (0x01) and of witnesses (0x04, 0x06).
        now: Unix seconds.
        foreign: see ``Checkpoint.parse``.

    Raises:
        MalformedMessageError: step 1.
        BadSignatureError: steps 2 and 3.
    """
    note = Note.parse(data)
    checkpoint = Checkpoint.parse(note.text, foreign=foreign)

    def verify(key: VerifierKey, text: str, blob: bytes) -> int | None:
        if key.type is KeyType.ED25519:
            verify_plain(key, text, blob)
            return None
        return verify_cosignature(key, text, blob, now=now)

    good = open_note(note, ring, verify)
    logs = [s.key for s in good if s.time is None and s.key.name == checkpoint.origin]
    if not logs:
        raise BadSignatureError(
            f"no configured key of the log {checkpoint.origin!r:.80} signed the checkpoint"
        )
    cosignatures = tuple(s for s in good if s.time is not None)
    return OpenedCheckpoint(
        checkpoint=checkpoint, note=note, log=logs[0], cosignatures=cosignatures
    )
