"""Invitations and what a node signs when it enrols. Normative text: protocols/spec/enrolment.md."""

from __future__ import annotations

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, field
from typing import Final

from protocols.canonical import hash_fields
from protocols.errors import TokenRefusedError
from protocols.identifiers import NodeId, parse_node_id

TOKEN_PREFIX: Final = "minga1"  # noqa: S105 - a version, not a secret
SECRET_BYTES: Final = 32
TRUST_BYTES: Final = 32
_MAX_TOKEN = 8192


def enrolment_proof_body(token_hash: bytes, csr_der: bytes, signing_key: bytes) -> bytes:
    """What the node's signing key signs: it binds both new keys to one invitation."""
    return hash_fields("minga/enrolment-proof/v1", token_hash, csr_der, signing_key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """What an operator hands to an institution: ``minga1.<institution>.<secret>.<root>[.<trust>]``.

    The root certificate travels whole, so the very first connection is verified: there is no
    trust on first use. ``trust`` is the SHA-256 of the first root of the trust repository: from it
    follows everything that the admins sign.
    """

    institution: NodeId
    secret: bytes = field(repr=False)  # 32 bytes, works once
    root_der: bytes = field(repr=False)  # the federation's root certificate
    trust_root: bytes = b""  # 32 bytes: SHA-256 of 1.root.json; empty before the founding

    def to_text(self) -> str:
        """One word without spaces."""
        fields = (self.secret, self.root_der, *filter(None, (self.trust_root,)))
        parts = [urlsafe_b64encode(part).rstrip(b"=").decode() for part in fields]
        return ".".join([TOKEN_PREFIX, self.institution, *parts])

    @classmethod
    def parse(cls, text: str) -> Invitation:
        """Read an invitation.

        Raises:
            TokenRefusedError: it is not one; the sentence never repeats the secret.
        """
        parts = text.strip().split(".")
        if len(text) > _MAX_TOKEN or len(parts) not in (4, 5) or parts[0] != TOKEN_PREFIX:
            raise TokenRefusedError("the token is not an invitation: minga1.<institution>.….…")
        try:
            secret, root, *trust = (
                urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in parts[2:]
            )
        except (binascii.Error, ValueError):
            raise TokenRefusedError("the token was damaged in copying") from None
        if len(secret) != SECRET_BYTES or not root or (trust and len(trust[0]) != TRUST_BYTES):
            raise TokenRefusedError("the token was damaged in copying")
        return cls(
            institution=parse_node_id(parts[1]),
            secret=secret,
            root_der=root,
            trust_root=trust[0] if trust else b"",
        )
