"""Signed notes: a text and signature lines under it (C2SP signed-note v1.0.0).

    <text, ends in a newline>
    <empty line>
    — <key name> <base64(4-byte key id || signature)>

The signed bytes are everything up to and including the newline before the last empty line. Notes
are read strictly; lines by keys that nobody configured are ignored, a bad signature by a configured
key spoils the whole note. Checkpoints are notes, and the only ones Minga makes.

A log's key is used for nothing else: the text is signed without a context of
``protocols.crypto.signatures``, since foreign tools must be able to verify it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocols.crypto.signatures import SIGNATURE_BYTES, BadSignatureError, parse_public_key
from protocols.errors import MalformedMessageError
from protocols.tlog.text import decode_base64, decode_base64_tail, decode_utf8, encode_base64

MAX_NOTE: Final = 1_000_000  # bytes
MAX_SIGNATURES: Final = 64  # lines; the specification asks for at least 16
MAX_NAME: Final = 255  # bytes: a C2SP cosignature of type 0x06 has one byte for the length
KEY_ID_BYTES: Final = 4
SEED_BYTES: Final = 32
_DASH: Final = "— "  # U+2014 and one space
_PRIVATE: Final = "PRIVATE+KEY+"


class KeyType(IntEnum):
    """The byte before a public key. 0x02 (ECDSA) and 0x05 (RFC 6962 STH) are not used."""

    ED25519 = 0x01  # a log
    ED25519_COSIGNATURE = 0x04  # a witness
    ML_DSA_44_COSIGNATURE = 0x06  # a witness; only where the caller says so


_PUBLIC_BYTES: Final = {
    KeyType.ED25519: 32,
    KeyType.ED25519_COSIGNATURE: 32,
    KeyType.ML_DSA_44_COSIGNATURE: 1312,
}


def check_name(name: str) -> str:
    """A key name: not empty, no white space, no '+', nothing invisible.

    Raises:
        MalformedMessageError: otherwise.
    """
    if not name or "+" in name or not name.isprintable() or any(map(str.isspace, name)):
        raise MalformedMessageError(f"not a key name: {name!r:.80}")
    if len(name.encode()) > MAX_NAME:
        raise MalformedMessageError(f"a key name of more than {MAX_NAME} bytes: {name!r:.80}")
    return name


def key_id(name: str, type_: KeyType, public_key: bytes) -> bytes:
    """SHA-256(name || 0x0A || type || public key), its first 4 bytes.

    Four bytes name a key and prove nothing: a line counts only when its signature verifies.
    """
    data = name.encode() + b"\n" + bytes([type_]) + public_key
    return hashlib.sha256(data).digest()[:KEY_ID_BYTES]


def _split_key(text: str, what: str) -> tuple[str, bytes, KeyType, bytes]:
    """Name, key id, type and the bytes behind the type of ``name+hex+base64``."""
    parts = text.split("+", 2)  # the base64 may itself hold '+'
    if len(parts) != 3:
        raise MalformedMessageError(f"{what} is not of the form name+id+key")
    name, hex_id, encoded = parts
    check_name(name)
    if len(hex_id) != 2 * KEY_ID_BYTES or not set(hex_id) <= set("0123456789abcdef"):
        raise MalformedMessageError(f"the id in {what} is not 8 lower-case hexadecimal digits")
    data = decode_base64(encoded, f"the key in {what}")
    if not data or data[0] not in set(KeyType):
        raise MalformedMessageError(f"{what} is of a type that is not used here")
    return name, bytes.fromhex(hex_id), KeyType(data[0]), data[1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierKey:
    """A public key with the name and the one use it has. Written as a vkey."""

    name: str
    type: KeyType
    public_key: bytes  # 32 bytes, or 1312 for ML-DSA-44

    def __post_init__(self) -> None:
        check_name(self.name)
        if len(self.public_key) != _PUBLIC_BYTES[self.type]:
            raise MalformedMessageError(
                f"a key of type {self.type:#04x} has {_PUBLIC_BYTES[self.type]} bytes"
            )
        if self.type is not KeyType.ML_DSA_44_COSIGNATURE:
            parse_public_key(self.public_key)

    @property
    def key_id(self) -> bytes:
        """4 bytes."""
        return key_id(self.name, self.type, self.public_key)

    @classmethod
    def parse(cls, text: str, *, ml_dsa: bool = False) -> VerifierKey:
        """Read ``name+hex8(key id)+base64(type || public key)``.

        Args:
            text: one vkey, nothing around it.
            ml_dsa: whether type 0x06 may be configured. Off: no independent program has verified
                our use of it, so it must not be what a quorum rests on.

        Raises:
            MalformedMessageError: any other form, a type that is not used, or a wrong id.
        """
        name, found, type_, public = _split_key(text, "the vkey")
        if type_ is KeyType.ML_DSA_44_COSIGNATURE and not ml_dsa:
            raise MalformedMessageError("keys of type 0x06 (ML-DSA-44) are switched off")
        key = cls(name=name, type=type_, public_key=public)
        if key.key_id != found:
            raise MalformedMessageError(f"the id in the vkey of {name} is not that of its key")
        return key

    def to_text(self) -> str:
        """The vkey."""
        encoded = encode_base64(bytes([self.type]) + self.public_key)
        return f"{self.name}+{self.key_id.hex()}+{encoded}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SignerKey:
    """An Ed25519 private key with the name and the one use it has. Never printed.

    The private form of Go's ``sumdb/note`` exists for logs (0x01) only.
    """

    name: str
    type: KeyType
    seed: bytes = field(repr=False)  # 32 bytes

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.type is KeyType.ML_DSA_44_COSIGNATURE:
            raise MalformedMessageError("signing with type 0x06 (ML-DSA-44) is switched off")
        if len(self.seed) != SEED_BYTES:
            raise MalformedMessageError(f"an Ed25519 seed has {SEED_BYTES} bytes")

    @classmethod
    def parse_private(cls, text: str) -> SignerKey:
        """Read ``PRIVATE+KEY+name+hex8(key id)+base64(0x01 || seed)``.

        Raises:
            MalformedMessageError: any other form. The message never repeats the text.
        """
        if not text.startswith(_PRIVATE):
            raise MalformedMessageError("not a private key: it does not begin with PRIVATE+KEY+")
        try:
            name, found, type_, seed = _split_key(text.removeprefix(_PRIVATE), "the private key")
        except MalformedMessageError:  # whose words may quote a part of a misplaced secret
            raise MalformedMessageError("the private key is not of the form name+id+key") from None
        if type_ is not KeyType.ED25519:
            raise MalformedMessageError("the private form is for keys of type 0x01 only")
        key = cls(name=name, type=type_, seed=seed)
        if key.verifier.key_id != found:
            raise MalformedMessageError(f"the id in the private key of {name} is not its own")
        return key

    def to_private(self) -> str:
        """The private form. A secret: write it to a file of mode 0600 and nowhere else.

        Raises:
            ValueError: not a key of type 0x01.
        """
        if self.type is not KeyType.ED25519:
            raise ValueError("the private form is for keys of type 0x01 only")
        encoded = encode_base64(bytes([self.type]) + self.seed)
        return f"{_PRIVATE}{self.name}+{self.verifier.key_id.hex()}+{encoded}"

    @property
    def verifier(self) -> VerifierKey:
        """The public half."""
        public = Ed25519PrivateKey.from_private_bytes(self.seed).public_key().public_bytes_raw()
        return VerifierKey(name=self.name, type=self.type, public_key=public)

    def sign(self, message: bytes) -> bytes:
        """64 bytes, the same every time."""
        return Ed25519PrivateKey.from_private_bytes(self.seed).sign(message)


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The keys somebody configured. No two share name and id, and no raw key stands twice.

    A cosignature does not name its cosigner, and one key with two names would count twice towards
    a quorum; one key as 0x01 and 0x04 would let a log's signature pose as a witness's.
    """

    keys: tuple[VerifierKey, ...]

    def __post_init__(self) -> None:
        if len({(key.name, key.key_id) for key in self.keys}) != len(self.keys):
            raise MalformedMessageError("two configured keys have the same name and id")
        if len({key.public_key for key in self.keys}) != len(self.keys):
            raise MalformedMessageError(
                "one public key is configured twice, under two names or uses"
            )

    @classmethod
    def of(cls, keys: Iterable[VerifierKey]) -> KeyRing:
        """Raises: MalformedMessageError."""
        return cls(tuple(keys))

    def find(self, name: str, id_: bytes) -> VerifierKey | None:
        """The configured key, or None for a stranger."""
        return next((k for k in self.keys if k.name == name and k.key_id == id_), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureLine:
    """One line under a note: who, and bytes that may be a signature.

    Foreign parsers let the unused bits of the last base64 character be anything. A line spelled so
    is read, or one stranger's line would spoil the note, but it is no good signature.
    """

    name: str
    key_id: bytes  # 4 bytes
    blob: bytes  # 1 or more bytes; what they are depends on the type of the key
    odd_spelling: str | None = None  # the base64 as it stood, where it is not canonical

    @classmethod
    def parse(cls, line: str) -> SignatureLine:
        """Read one line without its newline.

        Raises:
            MalformedMessageError: any other form.
        """
        name, space, encoded = line.removeprefix(_DASH).partition(" ")
        if not line.startswith(_DASH) or not space:
            raise MalformedMessageError(f"not a signature line: {line!r:.80}")
        data = decode_base64_tail(encoded, f"the signature of {name!r:.80}")
        if len(data) <= KEY_ID_BYTES:
            raise MalformedMessageError(f"the signature of {name!r:.80} is too short")
        return cls(
            name=check_name(name),
            key_id=data[:KEY_ID_BYTES],
            blob=data[KEY_ID_BYTES:],
            odd_spelling=None if encode_base64(data) == encoded else encoded,
        )

    def to_text(self) -> str:
        """The line with its newline."""
        encoded = self.odd_spelling or encode_base64(self.key_id + self.blob)
        return f"{_DASH}{self.name} {encoded}\n"

    def check_spelling(self) -> None:
        """A signature has one spelling, or two copies of a note could differ and both be good.

        Raises:
            BadSignatureError: the base64 is not canonical.
        """
        if self.odd_spelling is not None:
            raise BadSignatureError(f"the signature of {self.name} is not canonical base64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A text and its signature lines, nothing verified yet."""

    text: str  # ends in a newline
    signatures: tuple[SignatureLine, ...]  # 1 to 64

    @classmethod
    def parse(cls, data: bytes) -> Note:
        """Read a note; ``to_bytes`` gives the same bytes back.

        Raises:
            MalformedMessageError: not a note, larger than 1 MB, or more than 64 signature lines.
        """
        if len(data) > MAX_NOTE:
            raise MalformedMessageError(f"a note of {len(data)} bytes; at most {MAX_NOTE} are read")
        whole = decode_utf8(data, "the note")
        at = whole.rfind("\n\n")
        if at < 0 or not whole.endswith("\n"):
            raise MalformedMessageError("not a note: no empty line, or no newline at the end")
        lines = whole[at + 2 :].split("\n")[:-1]
        if not 1 <= len(lines) <= MAX_SIGNATURES:
            raise MalformedMessageError(
                f"a note has 1 to {MAX_SIGNATURES} signature lines, this one {len(lines)}"
            )
        return cls(
            text=whole[: at + 1], signatures=tuple(SignatureLine.parse(line) for line in lines)
        )

    def to_bytes(self) -> bytes:
        """The note as it is published."""
        return (self.text + "\n" + "".join(s.to_text() for s in self.signatures)).encode()


Verify = Callable[[VerifierKey, str, bytes], int | None]  # (key, text, blob) -> Unix time if told


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodSignature:
    """A signature that was verified, by a configured key."""

    key: VerifierKey
    time: int | None  # Unix seconds; None for type 0x01, which does not tell


_ed25519 = lru_cache(maxsize=1024)(Ed25519PublicKey.from_public_bytes)


def check_ed25519(public_key: bytes, message: bytes, signature: bytes, who: str) -> None:
    """Raises: BadSignatureError."""
    if len(signature) != SIGNATURE_BYTES:
        raise BadSignatureError(f"the signature of {who} does not have {SIGNATURE_BYTES} bytes")
    try:
        _ed25519(public_key).verify(signature, message)
    except InvalidSignature:
        raise BadSignatureError(f"the signature of {who} does not verify") from None


def verify_plain(key: VerifierKey, text: str, blob: bytes) -> None:
    """A signature of type 0x01 over the text.

    Raises:
        BadSignatureError: it does not verify, or the key is for another use.
    """
    if key.type is not KeyType.ED25519:
        raise BadSignatureError(f"the key of {key.name} is for cosignatures, not for notes")
    check_ed25519(key.public_key, text.encode(), blob, key.name)


def open_note(
    note: Note, ring: KeyRing, verify: Verify = verify_plain
) -> tuple[GoodSignature, ...]:
    """Verify every line by a configured key; each key counts once, with its latest time.

    Raises:
        BadSignatureError: a configured key's signature is bad, or no line is by a configured key.
    """
    good: dict[VerifierKey, int | None] = {}
    for line in note.signatures:
        key = ring.find(line.name, line.key_id)
        if key is None:
            continue
        line.check_spelling()
        time, before = verify(key, note.text, line.blob), good.get(key)
        good[key] = time if before is None or time is None else max(time, before)
    if not good:
        raise BadSignatureError("no signature of the note is by a configured key")
    return tuple(GoodSignature(key=key, time=time) for key, time in good.items())


def sign_note(text: str, *signers: SignerKey) -> Note:
    """Sign a text as a log does.

    Raises:
        MalformedMessageError: the text does not end in a newline, or has control characters.
        ValueError: a signer is not of type 0x01.
    """
    decode_utf8(text.encode(), "the text")
    if not text.endswith("\n"):
        raise MalformedMessageError("the text of a note ends in a newline")
    if any(signer.type is not KeyType.ED25519 for signer in signers):
        raise ValueError("a note is signed by keys of type 0x01; witnesses cosign")
    lines = tuple(
        SignatureLine(
            name=signer.name, key_id=signer.verifier.key_id, blob=signer.sign(text.encode())
        )
        for signer in signers
    )
    return Note(text=text, signatures=lines)
