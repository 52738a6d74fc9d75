"""Ed25519 signatures that say what they are about.

Every signature is made under a context, one for each kind of message, so that bytes signed as one
kind are never valid as another. All contexts are in ``Context``: two kinds cannot share one by
accident. Signed are ``b"minga-signature/v1\\n" || context || b"\\n" || body``; a context holds no
newline, so the split is unique. Source: RFC 8032 (PureEdDSA); keys and signatures are raw bytes.

Keys themselves never appear in an error or a repr.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from protocols.errors import IntegrityError, MalformedMessageError

PUBLIC_KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
_PREFIX: Final = b"minga-signature/v1\n"
_FIELD: Final = 2**255 - 19

# y coordinates of the points whose order divides 8. A signature under such a key verifies for
# many messages, so it would prove nothing about who signed what.
_LOW_ORDER_Y: Final = frozenset(
    {
        0,
        1,
        _FIELD - 1,
        2707385501144840649318225287225658788936804267575313519463743609750303402022,
        55188659117513257062467267217118295137698188065244968500265048394206261417927,
    }
)


class Context(StrEnum):
    """What a signature is about. One member for each kind of signed message."""

    ENROLMENT = "minga/enrolment/v1"
    ENROL_APPROVAL = "minga/enrol-approval/v1"
    PERSON_ENROL = "minga/person-enrol/v1"
    UPLOAD_HEADER = "minga/upload-header/v1"
    READY = "minga/secagg/ready/v1"
    DEAL = "minga/secagg/deal/v1"
    DEAL_OK = "minga/secagg/deal-ok/v1"
    COMPLAINT = "minga/secagg/complaint/v1"
    UPLOAD = "minga/secagg/upload/v1"
    COMMIT = "minga/secagg/commit/v1"
    ABORT = "minga/secagg/abort/v1"
    REVEAL = "minga/secagg/reveal/v1"
    RUN_REQUEST = "minga/run-request/v1"


class BadSignatureError(IntegrityError):
    """A signature is not by the key, over the bytes and of the kind that it is said to be."""

    code = "bad_signature"


def signing_input(context: Context, body: bytes) -> bytes:
    """The bytes that are signed for ``body`` under ``context``."""
    return _PREFIX + context.value.encode("ascii") + b"\n" + body


def sign(key: Ed25519PrivateKey, context: Context, body: bytes) -> bytes:
    """Sign ``body`` as a message of the kind ``context``; 64 bytes, the same every time."""
    return key.sign(signing_input(context, body))


def parse_public_key(data: bytes) -> bytes:
    """Check that 32 bytes are an Ed25519 public key fit to identify somebody; give them back.

    Raises:
        MalformedMessageError: other length, not a canonical encoding, or a point of low order.
    """
    if len(data) != PUBLIC_KEY_BYTES:
        raise MalformedMessageError(f"an Ed25519 public key has {PUBLIC_KEY_BYTES} bytes")
    y = int.from_bytes(data, "little") & (2**255 - 1)
    if y >= _FIELD:
        raise MalformedMessageError("the Ed25519 public key is not in canonical form")
    if y in _LOW_ORDER_Y:
        raise MalformedMessageError("the Ed25519 public key is a point of low order")
    return data


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The 32-byte public half."""
    return key.public_key().public_bytes_raw()


def verify(public_key: bytes, context: Context, body: bytes, signature: bytes) -> None:
    """Check a signature made by ``sign``.

    Args:
        public_key: 32 raw bytes, from a pinned roster or policy, never from the message itself.
        context: the kind of message the caller is about to act on.

    Raises:
        BadSignatureError: anything else than a valid signature of exactly this.
        MalformedMessageError: the key is no Ed25519 public key.
    """
    parse_public_key(public_key)
    if len(signature) != SIGNATURE_BYTES:
        raise BadSignatureError(f"an Ed25519 signature has {SIGNATURE_BYTES} bytes")
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(
            signature, signing_input(context, body)
        )
    except InvalidSignature:
        raise BadSignatureError(f"the signature does not verify as {context.value}") from None
