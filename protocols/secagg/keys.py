"""One attempt's keys: EK, RK, the self-mask seed and all randomness of dealing, from one seed.

A node draws 32 bytes from its operating system for each attempt and gives them to
``AttemptKeys.derive``. Keeping that one seed on disk until the upload is fixed makes a restarted
node send byte-identical messages; erasing it erases everything at once. The derivation is salted
with the attempt and the node, so even a seed used twice by mistake gives other keys.

X25519 is RFC 7748, HKDF-SHA256 RFC 5869, both from ``cryptography``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from protocols.canonical import hash_fields
from protocols.errors import MalformedMessageError
from protocols.identifiers import Digest, NodeId
from protocols.secagg.context import Attempt, u16
from protocols.secagg.threshold import MAX_ROSTER

KEY_BYTES: Final = 32
SALT_BYTES: Final = 16
# Any private key: a clamped scalar is a multiple of 8, so it maps exactly the points of low order
# to zero, which the library refuses.
_PROBE = X25519PrivateKey.from_private_bytes(bytes(31) + b"\x40")


def hkdf(*, ikm: bytes, salt: bytes, info: bytes, length: int = KEY_BYTES) -> bytes:
    """HKDF-SHA256, extract and expand."""
    return HKDF(algorithm=SHA256(), length=length, salt=salt, info=info).derive(ikm)


@functools.lru_cache(maxsize=1024)  # public keys only
def parse_x25519(data: bytes) -> bytes:
    """Check that 32 bytes are an X25519 public key that contributes to a shared secret.

    Raises:
        MalformedMessageError: other length, or a point of low order (all-zero output).
    """
    if len(data) != KEY_BYTES:
        raise MalformedMessageError(f"an X25519 public key has {KEY_BYTES} bytes")
    try:
        _PROBE.exchange(X25519PublicKey.from_public_bytes(data))
    except ValueError:
        raise MalformedMessageError("the X25519 public key is a point of low order") from None
    return data


def x25519_public(secret: bytes) -> bytes:
    """The public half of 32 secret bytes."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def x25519_shared(secret: bytes, public: bytes) -> bytes:
    """The shared secret of RFC 7748, section 6.1.

    Raises:
        MalformedMessageError: the result is all zero.
    """
    try:
        return X25519PrivateKey.from_private_bytes(secret).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError:
        raise MalformedMessageError("the X25519 public key is a point of low order") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptKeys:
    """What one node keeps secret in one attempt. Never reused, never printed."""

    ek_secret: bytes = field(repr=False)  # opens the packets sealed for this node
    rk_secret: bytes = field(repr=False)  # pair masks
    self_seed: bytes = field(repr=False)  # b, the self mask
    rk_randomness: bytes = field(repr=False)  # Shamir coefficients of rk_secret
    b_randomness: bytes = field(repr=False)  # Shamir coefficients of self_seed
    salts: bytes = field(repr=False)  # 16 bytes for each share that may be dealt
    # Of the noise on this node's update. Not a function of RK or b: whoever breaks X25519 one day,
    # or opens b, does not learn it.
    noise_seed: bytes = field(repr=False)

    @classmethod
    def derive(cls, seed: bytes, attempt: Attempt, node: NodeId) -> AttemptKeys:
        """All keys of ``node`` in ``attempt``.

        Args:
            seed: 32 fresh bytes from the operating system.

        Raises:
            ValueError: the seed has another length.
        """
        if len(seed) != KEY_BYTES:
            raise ValueError(f"an attempt seed has {KEY_BYTES} bytes")
        salt = hash_fields(
            "minga/attempt-seed/v1",
            attempt.federation.encode(),
            str(attempt.round).encode(),
            attempt.number.to_bytes(8, "big"),
            node.encode(),
        )

        def part(name: str, length: int = KEY_BYTES) -> bytes:
            info = b"minga/attempt/" + name.encode() + b"/v1"
            return hkdf(ikm=seed, salt=salt, info=info, length=length)

        coefficients = 32 * (attempt.terms.threshold - 1)
        return cls(
            ek_secret=part("ek"),
            rk_secret=part("rk"),
            self_seed=part("b"),
            rk_randomness=part("rk-shares", coefficients),
            b_randomness=part("b-shares", coefficients),
            salts=part("salts", 2 * MAX_ROSTER * SALT_BYTES),
            noise_seed=part("noise"),
        )

    @property
    def ek(self) -> bytes:
        """Public half of EK, 32 bytes."""
        return x25519_public(self.ek_secret)

    @property
    def rk(self) -> bytes:
        """Public half of RK, 32 bytes."""
        return x25519_public(self.rk_secret)

    def salt(self, index: int, kind: int) -> bytes:
        """The salt of the share of ``kind`` (0 or 1) for the member of ``index``."""
        place = 2 * (index - 1) + kind
        return self.salts[SALT_BYTES * place : SALT_BYTES * (place + 1)]


def self_seed_commitment(ctx_deal: Digest, index: int, self_seed: bytes) -> bytes:
    """Hb, 32 bytes: binds the dealer of ``index`` to its b before any upload. b has 256 bits of
    entropy, so the hash hides it."""
    return hash_fields("minga/self-seed/v1", bytes.fromhex(ctx_deal), u16(index), self_seed)


def packet_key(
    ctx_deal: Digest, own_ek_secret: bytes, peer_ek: bytes, *, dealer: int, to: int
) -> bytes:
    """Key of the one packet from ``dealer`` to ``to``: 32 bytes, used once, so nonce 0 is fresh.

    HKDF-SHA256(salt = ctx_deal, ikm = X25519(EK, EK), info = "minga/share/v1" || dealer || to).
    """
    return hkdf(
        ikm=x25519_shared(own_ek_secret, peer_ek),
        salt=bytes.fromhex(ctx_deal),
        info=b"minga/share/v1" + u16(dealer) + u16(to),
    )


def pair_mask_key(
    ctx: Digest,
    own_rk_secret: bytes,
    *,
    own: tuple[int, bytes],
    peer: tuple[int, bytes],
) -> bytes:
    """Key of the mask shared by two members: 32 bytes, equal on both sides.

    HKDF-SHA256(salt = ctx, ikm = X25519(RK, RK),
    info = "minga/mask/pair/v1" || lo || hi || pk_lo || pk_hi).

    Args:
        own, peer: (index, RK public) of the two members.
    """
    (lo, pk_lo), (hi, pk_hi) = sorted((own, peer))
    return hkdf(
        ikm=x25519_shared(own_rk_secret, peer[1]),
        salt=bytes.fromhex(ctx),
        info=b"minga/mask/pair/v1" + u16(lo) + u16(hi) + pk_lo + pk_hi,
    )


def self_mask_key(ctx: Digest, self_seed: bytes, index: int) -> bytes:
    """Key of a member's self mask: HKDF-SHA256(salt = ctx, ikm = b,
    info = "minga/mask/self/v1" || index)."""
    return hkdf(ikm=self_seed, salt=bytes.fromhex(ctx), info=b"minga/mask/self/v1" + u16(index))
