"""Every parser of the log, fed with damaged files: it reads the same bytes back, or refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.crypto.signatures import BadSignatureError
from protocols.errors import MalformedMessageError
from protocols.tlog.checkpoint import Checkpoint
from protocols.tlog.leaf import Statement, open_leaf
from protocols.tlog.note import Note, SignerKey, VerifierKey
from protocols.tlog.proof_file import ProofFile
from protocols.tlog.tiles import Tile, parse_bundle, write_bundle
from protocols.tlog.trust_policy import TrustPolicy
from protocols.tlog.witness import Request, write_request
from tests.support.tlog import LOG, formats, policy_text, signed

LEAF = formats()["dsse_and_leaf"]["leaf"]


def text(parse: Callable[[str], str]) -> Callable[[bytes], bytes]:
    """A parser of text as one of bytes; latin-1 so that every byte is some character."""
    return lambda data: parse(data.decode("latin-1")).encode("latin-1")


def request(data: bytes) -> bytes:
    found = Request.parse(data)
    return write_request(old=found.old, proof=found.proof, checkpoint=found.note.to_bytes())


def no_writer(parse: Callable[[bytes], object]) -> Callable[[bytes], bytes]:
    """For a format of which we are only readers."""

    def read(data: bytes) -> bytes:
        parse(data)
        return data

    return read


CHECKPOINT = signed(5).text.encode()
HASHES = tuple(bytes([i]) * 32 for i in range(3))
PARSERS: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
    "note": (signed(5, "w1").to_bytes(), lambda data: Note.parse(data).to_bytes()),
    "checkpoint": (CHECKPOINT, text(lambda t: Checkpoint.parse(t).to_text())),
    "foreign": (CHECKPOINT, text(lambda t: Checkpoint.parse(t, foreign=True).to_text())),
    "vkey": (LOG.verifier.to_text().encode(), text(lambda t: VerifierKey.parse(t).to_text())),
    "skey": (LOG.to_private().encode(), text(lambda t: SignerKey.parse_private(t).to_private())),
    "tile": (b"tile/1/x001/234.p/17", text(lambda t: Tile.parse(t).path)),
    "bundle": (write_bundle([b"a", b"bc", b""]), lambda d: write_bundle(parse_bundle(d, 3))),
    "proof": (
        ProofFile(index=5, hashes=HASHES, checkpoint=CHECKPOINT, extra=b"x").to_bytes(),
        lambda data: ProofFile.parse(data).to_bytes(),
    ),
    "policy": (policy_text(), no_writer(TrustPolicy.parse)),
    "statement": (LEAF["statement_jcs"].encode(), lambda data: Statement.parse(data).to_bytes()),
    "leaf": (LEAF["entry"].encode(), no_writer(lambda data: open_leaf(data, {}))),
    "request": (
        write_request(old=3, proof=HASHES, checkpoint=signed(5).to_bytes()),
        request,
    ),
}

edits = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.integers(0, 3),
        st.one_of(
            st.sampled_from([b"\n", b"\n\n", b" ", b"+", b"=", b"\x00", b"\r", b"\xe2\x80\x94 "]),
            st.binary(min_size=1, max_size=2),
        ),
    ),
    max_size=3,
)


def damage(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for place, cut, new in changes:
        at = place % (len(data) + 1)
        data = data[:at] + new + data[at + cut :]
    return data


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=80, deadline=None)
@given(edits)
def test_a_damaged_file_is_read_exactly_or_refused(name, changes):
    good, again = PARSERS[name]
    data = damage(good, changes)
    try:
        assert again(data) == data
    except MalformedMessageError:
        assert data != good
    except BadSignatureError:
        assert name == "leaf"  # it was read; the membership here is empty


@pytest.mark.parametrize("name", sorted(set(PARSERS) - {"leaf"}))
def test_an_undamaged_file_is_read(name):
    """Else the property above would hold for a parser that refuses everything."""
    good, again = PARSERS[name]
    assert again(good) == good
