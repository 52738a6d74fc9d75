"""Secret bytes: the AES-256-CTR key stream of a seed, read in order or from any place.

NIST SP 800-38A, section 6.5, as in ``protocols.tensors.encode`` and ``protocols.secagg.masks``.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

SEED_BYTES = 32
_BLOCK = 16  # bytes
_READ = 4096  # bytes fetched at once by ``Uniform``


def key_stream(seed: bytes, block: int) -> CipherContext:
    """The key stream of ``seed`` from its block ``block`` of 16 bytes on; feed it zeros.

    Raises:
        ValueError: the seed has not 32 bytes, or the block is out of range.
    """
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a seed has {SEED_BYTES} bytes")
    if not 0 <= block < 1 << 128:
        raise ValueError("a block counter is 0 to 2**128 - 1")
    nonce = modes.CTR(block.to_bytes(_BLOCK, "big"))
    return Cipher(algorithms.AES256(seed), nonce).encryptor()


class Uniform:
    """Whole numbers without bias, from the key stream of a seed."""

    __slots__ = ("_at", "_buffer", "_stream")

    def __init__(self, seed: bytes) -> None:
        self._stream = key_stream(seed, 0)
        self._buffer, self._at = b"", 0

    def __repr__(self) -> str:
        return "Uniform()"

    def _take(self, count: int) -> bytes:
        while len(self._buffer) - self._at < count:
            self._buffer = self._buffer[self._at :] + self._stream.update(bytes(_READ))
            self._at = 0
        self._at += count
        return self._buffer[self._at - count : self._at]

    def below(self, n: int) -> int:
        """A number from 0 to n - 1, each as likely; n at least 1. Draws again what would bias."""
        if n < 1:
            raise ValueError("want n >= 1")
        bits = (n - 1).bit_length()
        size = (bits + 7) // 8
        while True:
            value = int.from_bytes(self._take(size), "little") & ((1 << bits) - 1)
            if value < n:
                return value
