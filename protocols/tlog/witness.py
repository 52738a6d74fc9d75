"""What a witness answers to add-checkpoint (C2SP tlog-witness v1.0.0): one pure function.

    old <size>                     the size the caller believes we cosigned last
    <base64 hash>                  0 to 63 lines: consistency from old to the checkpoint
    <empty line>
    <checkpoint>

The checks have an order, since each answer tells something: 400 the body does not parse; 404 the
origin is unknown; 403 the log's signature is missing or bad; 400 old is above the size; 409 old is
not our latest, with the latest in the body; 422 the proof is wrong; else 200 with a cosignature.

Comparing ``old`` with the latest head and storing the new one must be one transaction, durable
before the answer leaves: two requests that both read the old head would get cosignatures on two
branches. A witness that lost its database is retired with its key; it must not start from nothing.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from protocols.crypto.signatures import BadSignatureError
from protocols.errors import MalformedMessageError
from protocols.tlog.checkpoint import Checkpoint
from protocols.tlog.cosignature import cosign, verify_cosignature
from protocols.tlog.merkle import EMPTY_ROOT
from protocols.tlog.note import (
    MAX_NOTE,
    MAX_SIGNATURES,
    GoodSignature,
    KeyRing,
    KeyType,
    Note,
    SignatureLine,
    SignerKey,
    open_note,
)
from protocols.tlog.proofs import BadProofError, verify_consistency
from protocols.tlog.text import (
    MAX_PROOF,
    decode_decimal,
    decode_hash,
    decode_utf8,
    encode_base64,
)

SIZE_CONTENT_TYPE: Final = "text/x.tlog.size"
TEXT_CONTENT_TYPE: Final = "text/plain; charset=utf-8"
MAX_REQUEST: Final = MAX_NOTE + 4096  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The latest tree of an origin that this witness cosigned."""

    size: int  # leaves
    root: bytes  # 32 bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A parsed body of add-checkpoint; nothing is verified."""

    old: int
    proof: tuple[bytes, ...]
    note: Note
    checkpoint: Checkpoint

    @classmethod
    def parse(cls, body: bytes) -> Request:
        """Read a body.

        Raises:
            MalformedMessageError: any other form.
        """
        if len(body) > MAX_REQUEST:
            raise MalformedMessageError(f"a request of more than {MAX_REQUEST} bytes")
        head, empty, rest = body.partition(b"\n\n")
        lines = decode_utf8(head, "the request").split("\n")
        if not empty or not lines[0].startswith("old "):
            raise MalformedMessageError("a request begins with an old line, an empty line ends it")
        old = decode_decimal(lines[0].removeprefix("old "), "the old size")
        if len(lines) - 1 > MAX_PROOF:
            raise MalformedMessageError(f"a proof of more than {MAX_PROOF} hashes")
        proof = tuple(decode_hash(line, "a hash of the proof") for line in lines[1:])
        note = Note.parse(rest)
        checkpoint = Checkpoint.parse(note.text, foreign=True)
        return cls(old=old, proof=proof, note=note, checkpoint=checkpoint)


def write_request(*, old: int, proof: Sequence[bytes], checkpoint: bytes) -> bytes:
    """The body of add-checkpoint. ``checkpoint`` is a signed note, verbatim."""
    lines = [f"old {old}", *map(encode_base64, proof)]
    return ("\n".join(lines) + "\n\n").encode() + checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What to send, and on 200 what must be stored before it is sent."""

    status: int  # of HTTP
    body: bytes
    why: str  # one line for diagnostics
    content_type: str = TEXT_CONTENT_TYPE
    store: Head | None = None


def _refuse(status: int, why: str) -> Answer:
    return Answer(status=status, body=f"{why}\n".encode(), why=why)


def add_checkpoint(
    body: bytes,
    *,
    logs: Mapping[str, KeyRing],
    latest: Mapping[str, Head],
    signer: SignerKey,
    now: int,
) -> Answer:
    """Decide on one request.

    Args:
        body: as received.
        logs: the keys (0x01) of each origin we witness; a key need not be named like its origin.
        latest: what was stored last, read inside the transaction that will store the answer.
        signer: this witness's key, type 0x04.
        now: Unix seconds; becomes the time of the cosignature.

    Raises:
        ValueError: ``signer`` or ``now`` cannot be used. Nothing the caller of HTTP sends raises.
    """
    try:
        request = Request.parse(body)
    except MalformedMessageError as error:
        return _refuse(400, str(error))
    new, origin = request.checkpoint, request.checkpoint.origin
    ring = logs.get(origin)
    if ring is None:  # before 403: a stranger's log is none of our business, signed or not
        return _refuse(404, "the origin is not witnessed here")
    try:
        open_note(request.note, ring)
    except BadSignatureError as error:
        return _refuse(403, str(error))
    if request.old > new.size:
        return _refuse(400, f"old {request.old} is above the size {new.size}")
    head = latest.get(origin)
    known = 0 if head is None else head.size
    if request.old != known:
        why = f"old {request.old} is not the latest size {known}"
        size = f"{known}\n".encode()
        return Answer(status=409, body=size, why=why, content_type=SIZE_CONTENT_TYPE)
    try:
        _check_extends(head, request)
    except BadProofError as error:
        return _refuse(422, str(error))
    line = cosign(request.note.text, signer=signer, time=now)
    return Answer(
        status=200,
        body=line.to_text().encode(),
        why=f"cosigned {origin} at size {new.size}, before {known}",
        store=Head(size=new.size, root=new.root),
    )


def _check_extends(head: Head | None, request: Request) -> None:
    """Raises: BadProofError."""
    new = request.checkpoint
    if new.size == 0 and not hmac.compare_digest(new.root, EMPTY_ROOT):
        raise BadProofError("size 0 has another root than SHA-256 of nothing")
    if request.old > 0 and head is not None:
        verify_consistency(
            old=head.size,
            old_root=head.root,
            new=new.size,
            new_root=new.root,
            proof=request.proof,
        )
    elif request.proof:
        raise BadProofError("from size 0 there is nothing to prove")


def parse_answer(
    body: bytes, *, text: str, ring: KeyRing, now: int
) -> tuple[tuple[SignatureLine, GoodSignature], ...]:
    """Read a witness's 200: the lines to put under the checkpoint, verified.

    Lines by keys outside ``ring`` are left out, so that an answer cannot smuggle in other lines.

    Args:
        body: one or more cosignature lines.
        text: the text of the checkpoint that was sent.
        ring: the keys of this witness.
        now: Unix seconds.

    Raises:
        MalformedMessageError: not signature lines.
        BadSignatureError: a line by a key of the witness is bad, or none is by one.
    """
    if len(body) > MAX_NOTE:
        raise MalformedMessageError(f"an answer of more than {MAX_NOTE} bytes")
    lines = decode_utf8(body, "the answer").split("\n")
    if lines.pop() or not 1 <= len(lines) <= MAX_SIGNATURES:
        raise MalformedMessageError("the answer is not a list of signature lines")
    found: list[tuple[SignatureLine, GoodSignature]] = []
    for line in map(SignatureLine.parse, lines):
        key = ring.find(line.name, line.key_id)
        if key is not None and key.type is not KeyType.ED25519:
            line.check_spelling()
            time = verify_cosignature(key, text, line.blob, now=now)
            found.append((line, GoodSignature(key=key, time=time)))
    if not found:
        raise BadSignatureError("the answer has no cosignature by the witness that was asked")
    return tuple(found)


def add_lines(note: Note, lines: Iterable[SignatureLine]) -> Note:
    """The note with more lines under it; a line that it already has is not repeated."""
    unique = dict.fromkeys((*note.signatures, *lines))
    return Note(text=note.text, signatures=tuple(unique))


def monitoring_path(origin: str) -> str:
    """Where a witness shows the latest checkpoint of an origin, below its monitoring prefix."""
    return f"{hashlib.sha256(origin.encode()).hexdigest()}/checkpoint"
