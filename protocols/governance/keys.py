"""A key has one id, whoever writes it; and a holder, who answers for one institution.

TUF and DSSE count key *ids*, so one key under two ids would pass a threshold of two (the id of a
key in metadata is whatever its writer says). Here an id is always computed from the key, and two
keys are the same key when their public material is, however they are spelled.

The holder stands in the key itself, as the field ``x-minga-holder`` of the TUF key object: it is
signed with the root, and the id does not depend on it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)
from securesystemslib.formats import encode_canonical
from securesystemslib.signer import Key, SSlibKey

from protocols.crypto.signatures import parse_public_key
from protocols.errors import MalformedMessageError
from protocols.governance.errors import TrustRefusedError
from protocols.identifiers import NodeId, parse_node_id

HOLDER_FIELD: Final = "x-minga-holder"
SCHEMES: Final = frozenset(
    {("ed25519", "ed25519"), ("ecdsa", "ecdsa-sha2-nistp256"), ("ecdsa", "ecdsa-sha2-nistp384")}
)
_CURVES: Final = {"ecdsa-sha2-nistp256": ec.SECP256R1, "ecdsa-sha2-nistp384": ec.SECP384R1}


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Holder:
    """Who holds a key: a name inside the federation, never a person's."""

    person: str  # e.g. admin-ar
    institution: NodeId
    country: str  # ISO 3166-1 alpha-2

    def to_value(self) -> dict[str, str]:
        """As it stands in the key."""
        return {
            "person": self.person,
            "institution": self.institution,
            "country": self.country,
        }

    def __str__(self) -> str:
        return f"{self.person} ({self.institution}, {self.country})"


def parse_country(text: object) -> str:
    """Two capital letters. Raises: MalformedMessageError."""
    if not isinstance(text, str) or len(text) != 2 or not text.isascii() or not text.isupper():
        raise MalformedMessageError(f"a country is two capital letters (ISO 3166-1), not {text!r}")
    return text


def parse_holder(value: object) -> Holder:
    """Read the holder of a key.

    Raises:
        MalformedMessageError: missing fields, unknown fields or wrong names.
    """
    if not isinstance(value, dict) or set(value) != {"person", "institution", "country"}:
        raise MalformedMessageError("a key's holder is a person, an institution and a country")
    return Holder(
        person=parse_node_id(value["person"]),
        institution=parse_node_id(value["institution"]),
        country=parse_country(value["country"]),
    )


def material(key: Key) -> bytes:
    """The public key itself, in one spelling: what two ids of one key have in common.

    Raises:
        MalformedMessageError: another kind of key than Ed25519 or ECDSA P-256/P-384, or unreadable.
    """
    if (key.keytype, key.scheme) not in SCHEMES:
        raise MalformedMessageError(f"keys of kind {key.keytype}/{key.scheme} are not used")
    if set(key.keyval) != {"public"} or not isinstance(key.keyval["public"], str):
        raise MalformedMessageError("the value of a key is its public half and nothing else")
    public: str = key.keyval["public"]
    if key.keytype == "ed25519":
        try:
            raw = bytes.fromhex(public)
        except ValueError:
            raise MalformedMessageError("an Ed25519 key is written in hexadecimal") from None
        if raw.hex() != public:
            raise MalformedMessageError("an Ed25519 key is written in lower-case hexadecimal")
        return b"ed25519:" + parse_public_key(raw)
    try:
        loaded = load_pem_public_key(public.encode("ascii"))
    except (ValueError, UnicodeError):
        raise MalformedMessageError("an ECDSA key is written as PEM") from None
    if not isinstance(loaded, ec.EllipticCurvePublicKey) or not isinstance(
        loaded.curve, _CURVES[key.scheme]
    ):
        raise MalformedMessageError(f"the key is not on the curve of {key.scheme}")
    spki = loaded.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return b"ecdsa:" + spki


def key_id(key: Key) -> str:
    """SHA-256 of the canonical key (TUF's convention): 64 hexadecimal digits."""
    value = {"keytype": key.keytype, "scheme": key.scheme, "keyval": key.keyval}
    text = encode_canonical(value)
    return hashlib.sha256((text or "").encode()).hexdigest()


def check_key(key: Key) -> Key:
    """A key whose id is its own.

    Raises:
        TrustRefusedError: trust.alias.
        MalformedMessageError: see ``material``.
    """
    material(key)
    if key.keyid != key_id(key):
        raise TrustRefusedError(
            f"a key stands under the id {key.keyid[:12]}…, its own is {key_id(key)[:12]}…",
            rule="trust.alias",
        )
    return key


def holder_of(key: Key) -> Holder:
    """Who holds a key, as the key says. Raises: MalformedMessageError."""
    return parse_holder(key.unrecognized_fields.get(HOLDER_FIELD))


def ed25519_key(public: bytes, holder: Holder | None = None) -> SSlibKey:
    """A TUF key from 32 raw bytes. Raises: MalformedMessageError."""
    keyval = {"public": parse_public_key(public).hex()}
    return _with_holder(SSlibKey("", "ed25519", "ed25519", keyval), holder)


def with_holder(key: Key, holder: Holder) -> SSlibKey:
    """The same key, saying who holds it."""
    return _with_holder(SSlibKey("", key.keytype, key.scheme, dict(key.keyval)), holder)


def _with_holder(key: SSlibKey, holder: Holder | None) -> SSlibKey:
    fields: dict[str, Any] = {} if holder is None else {HOLDER_FIELD: holder.to_value()}
    made = SSlibKey(key_id(key), key.keytype, key.scheme, dict(key.keyval), fields)
    check_key(made)
    return made


def key_to_value(key: Key) -> dict[str, Any]:
    """A key as it stands in a document: with its id, and its holder where it has one."""
    return {"keyid": key.keyid, **key.to_dict()}


def parse_key(value: object) -> SSlibKey:
    """Read a key from a document.

    Raises:
        MalformedMessageError, TrustRefusedError: see ``check_key``.
    """
    if not isinstance(value, dict) or not value.keys() <= {
        "keyid", "keytype", "scheme", "keyval", HOLDER_FIELD,
    }:  # fmt: skip
        raise MalformedMessageError("a key has keyid, keytype, scheme, keyval and its holder")
    try:
        keyid, kind, scheme = value["keyid"], value["keytype"], value["scheme"]
        keyval = dict(value["keyval"])
    except (KeyError, TypeError, ValueError):
        raise MalformedMessageError("a key has keyid, keytype, scheme and keyval") from None
    if not all(isinstance(item, str) for item in (keyid, kind, scheme, *keyval.values())):
        raise MalformedMessageError("a key's id, kind, scheme and value are texts")
    fields = {}
    if HOLDER_FIELD in value:
        fields[HOLDER_FIELD] = parse_holder(value[HOLDER_FIELD]).to_value()
    try:
        key = SSlibKey(keyid, kind, scheme, keyval, fields)
    except ValueError:  # such as a key without its public part
        raise MalformedMessageError("a key's value has its public part") from None
    check_key(key)
    return key
