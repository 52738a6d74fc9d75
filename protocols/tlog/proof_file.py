"""A leaf's proof in one file, to be kept and verified offline: c2sp.org/tlog-proof@v1.

c2sp.org/tlog-proof@v1
extra <base64>                 optional; not authenticated, and never written by us
index <n>
<base64 hash>                  leaf's sibling first
<empty line>
<checkpoint, with its signatures>
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocols.errors import MalformedMessageError
from protocols.tlog.merkle import leaf_hash
from protocols.tlog.note import MAX_NOTE
from protocols.tlog.proofs import verify_inclusion
from protocols.tlog.text import (
    MAX_PROOF,
    MAX_SIZE,
    decode_base64,
    decode_decimal,
    decode_hash,
    decode_utf8,
    encode_base64,
)
from protocols.tlog.trust_policy import Accepted, TrustPolicy, accept_checkpoint

HEADER: Final = "c2sp.org/tlog-proof@v1"
MAX_FILE: Final = MAX_NOTE + 100_000  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofFile:
    """The frame of a proof: nothing in it is verified."""

    index: int  # of the leaf
    hashes: tuple[bytes, ...]  # 32 bytes each
    checkpoint: bytes  # verbatim
    extra: bytes | None = None  # read so that the file can be given back, otherwise ignored

    def __post_init__(self) -> None:
        if not 0 <= self.index < MAX_SIZE or len(self.hashes) > MAX_PROOF:
            raise MalformedMessageError(
                f"a proof has an index below 2**63-1 and at most {MAX_PROOF} hashes"
            )
        if not self.checkpoint:
            raise MalformedMessageError("a proof without a checkpoint")

    @classmethod
    def parse(cls, data: bytes) -> ProofFile:
        """Read a proof file; ``to_bytes`` gives the same bytes back.

        Raises:
            MalformedMessageError: any other form.
        """
        if len(data) > MAX_FILE:
            raise MalformedMessageError(f"a proof file of more than {MAX_FILE} bytes")
        head, empty, checkpoint = data.partition(b"\n\n")
        if not empty:
            raise MalformedMessageError("a proof file has an empty line before the checkpoint")
        lines = decode_utf8(head, "the proof file").split("\n")
        if lines.pop(0) != HEADER:
            raise MalformedMessageError(f"a proof file begins with {HEADER}")
        extra = None
        if lines and lines[0].startswith("extra "):
            extra = decode_base64(lines.pop(0).removeprefix("extra "), "the extra line")
        if not lines or not lines[0].startswith("index "):
            raise MalformedMessageError("the index line is missing in the proof file")
        index = decode_decimal(lines.pop(0).removeprefix("index "), "the index")
        if len(lines) > MAX_PROOF:
            raise MalformedMessageError(f"a proof of {len(lines)} hashes; at most {MAX_PROOF}")
        hashes = tuple(decode_hash(line, "a hash of the proof") for line in lines)
        return cls(index=index, hashes=hashes, checkpoint=checkpoint, extra=extra)

    def to_bytes(self) -> bytes:
        """The file."""
        extra = [] if self.extra is None else [f"extra {encode_base64(self.extra)}"]
        lines = [HEADER, *extra, f"index {self.index}", *map(encode_base64, self.hashes)]
        return ("\n".join(lines) + "\n\n").encode() + self.checkpoint


def verify_proof_file(
    data: bytes, entry: bytes, policy: TrustPolicy, *, now: int, fresh_s: int | None = None
) -> tuple[int, Accepted]:
    """Check that ``entry`` is in the log that ``policy`` trusts; return its index and the evidence.

    1. The frame parses. 2. The checkpoint satisfies the policy. 3. The leaf hash of ``entry``
    stands at the index of the tree under that checkpoint. The caller still owes the leaf's own
    signature (``leaf.open_leaf``).

    Raises:
        MalformedMessageError: step 1 or 2.
        BadSignatureError, QuorumError: step 2.
        BadProofError: step 3.
    """
    proof = ProofFile.parse(data)
    accepted = accept_checkpoint(policy, proof.checkpoint, now=now, fresh_s=fresh_s)
    head = accepted.opened.checkpoint
    verify_inclusion(
        leaf=leaf_hash(entry),
        index=proof.index,
        size=head.size,
        root=head.root,
        proof=proof.hashes,
    )
    return proof.index, accepted
