"""protocols/spec/upload.md: the bytes of its example, and one row for each refusal it demands."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.services.bulk import Expected, check_header, check_may_upload
from protocols.canonical import canonical_bytes, parse_json
from protocols.cohort import terms_of
from protocols.crypto.signatures import Context, public_bytes, sign
from protocols.errors import FederationError
from protocols.identifiers import Digest, FederationId, NodeId, RunId
from protocols.rounds import Training, Uploading
from protocols.tensors.units import digest_of_units, unit_hashes
from protocols.upload import UploadHeader, check_unit_hashes, sign_header, verify_header
from tests.support.node import ME, NOW, digest, the_plan

SPEC = Path(__file__).parents[2] / "protocols" / "spec" / "upload.md"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
DATA = bytes(i % 251 for i in range(4 * 2**20 + 2500))
HASHES = unit_hashes(DATA)
EXAMPLE = UploadHeader(
    federation=FederationId("demo"),
    run=RunId("andes-1"),
    round=4,
    attempt=1,
    node=NodeId("cusco"),
    plan=Digest("11" * 32),
    model=Digest("22" * 32),
    coordinates=1_000_000,
    ring=20,
    size=len(DATA),
    root=digest_of_units(HASHES),
)


def test_the_example():
    text = SPEC.read_text("utf-8")
    values = dict(re.findall(r"\| ([a-z][\w ]+?) \| `([0-9a-f]+)` \|", text))
    (line,) = re.findall(r'^\{"attempt".*\}$', text, re.MULTILINE)

    assert line.encode() == EXAMPLE.to_bytes()
    assert f"{len(line)} bytes" in text
    assert values == {
        "hash of unit 0": HASHES[0].hex(),
        "hash of unit 1": HASHES[1].hex(),
        "root": EXAMPLE.root,
        "signature of the header": sign_header(KEY, EXAMPLE).hex(),
        "upload id": EXAMPLE.upload_id.hex(),
        "receipt": EXAMPLE.receipt.hex(),
    }


PLAN = the_plan()
ROUND_HEADER = replace(
    EXAMPLE, run=PLAN.run_id, node=ME, plan=PLAN.digest, model=digest("start"), coordinates=1048
)
EXPECTED = Expected(plan=PLAN, model=digest("start"), coordinates=1048, size=len(DATA))
UPLOADING = Uploading(
    terms=terms_of(PLAN), closes_at=NOW + timedelta(hours=1), attempt=1, ready=frozenset({ME})
)
TRAINING = Training(terms=terms_of(PLAN), closes_at=NOW, cohort=frozenset({ME}))


def edited(**changes):
    """The example's bytes with other fields; None takes one out."""
    value = parse_json(EXAMPLE.to_bytes()) | changes
    return canonical_bytes({k: v for k, v in value.items() if v is not None})


def signed(body, *, key=KEY, context=Context.UPLOAD_HEADER):
    return verify_header(public_bytes(KEY), body, sign(key, context, body))


OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
REFUSED = [
    ("2.2 a field more", lambda: signed(edited(more=1)), "malformed"),
    ("2.2 a field less", lambda: signed(edited(model=None)), "malformed"),
    ("2.2 another schema", lambda: signed(edited(schema="minga.upload/2")), "malformed"),
    ("2.2 a string for a number", lambda: signed(edited(size="4")), "malformed"),
    ("2.2 true for a number", lambda: signed(edited(attempt=True)), "malformed"),
    ("2.2 attempt 0", lambda: signed(edited(attempt=0)), "malformed"),
    ("2.2 no bytes", lambda: signed(edited(size=0)), "malformed"),
    ("2.2 a root that is none", lambda: signed(edited(root="AF" * 32)), "malformed"),
    ("2.2 not canonical", lambda: signed(edited().replace(b":", b": ", 1)), "malformed"),
    ("2.2 too long", lambda: signed(edited(node="a" * 5000)), "malformed"),
    ("2.4 another key", lambda: signed(edited(), key=OTHER_KEY), "bad_signature"),
    ("2.4 another context", lambda: signed(edited(), context=Context.ENROLMENT), "bad_signature"),
    (
        "2.4 other bytes",
        lambda: verify_header(public_bytes(KEY), edited(round=5), sign_header(KEY, EXAMPLE)),
        "bad_signature",
    ),
    ("2.5 a hash missing", lambda: check_unit_hashes(EXAMPLE, HASHES[:1]), "malformed"),
    ("2.5 a hash more", lambda: check_unit_hashes(EXAMPLE, (*HASHES, bytes(32))), "malformed"),
    ("2.5 a short hash", lambda: check_unit_hashes(EXAMPLE, (HASHES[0], b"x")), "malformed"),
    ("2.5 another root", lambda: check_unit_hashes(EXAMPLE, HASHES[::-1]), "malformed"),
    (
        "2.3 somebody else's",
        lambda: check_header(ROUND_HEADER, NodeId("b"), EXPECTED),
        "not_listed",
    ),
    *(
        (
            f"2.3 another {field}",
            lambda field=field, value=value: check_header(
                replace(ROUND_HEADER, **{field: value}), ME, EXPECTED
            ),
            "malformed",
        )
        for field, value in [
            ("federation", FederationId("other")),
            ("plan", digest("other")),
            ("model", digest("other")),
            ("ring", 24),
            ("coordinates", 1047),
            ("size", len(DATA) - 1),
        ]
    ),
    ("3.2 too early", lambda: check_may_upload(TRAINING, ROUND_HEADER), "wrong_phase"),
    (
        "3.2 another attempt",
        lambda: check_may_upload(UPLOADING, replace(ROUND_HEADER, attempt=2)),
        "wrong_phase",
    ),
    (
        "3.2 not ready",
        lambda: check_may_upload(UPLOADING, replace(ROUND_HEADER, node=NodeId("b"))),
        "not_listed",
    ),
]


@pytest.mark.parametrize(
    ("act", "code"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_refused(act, code):
    with pytest.raises(FederationError) as caught:
        act()
    assert caught.value.code == code


def test_what_is_right_is_taken():
    """A table of refusals means little if nothing is ever taken."""
    assert signed(edited()) == EXAMPLE
    check_unit_hashes(EXAMPLE, HASHES)
    check_header(ROUND_HEADER, ME, EXPECTED)
    check_may_upload(UPLOADING, ROUND_HEADER)


def test_the_upload_id_is_blind_to_the_content():
    """So that a second header meets the first; everything else makes another upload."""
    assert replace(EXAMPLE, root=digest("x"), size=1).upload_id == EXAMPLE.upload_id
    for changes in ({"round": 5}, {"attempt": 2}, {"node": ME}, {"run": RunId("r")}):
        assert replace(EXAMPLE, **changes).upload_id != EXAMPLE.upload_id
        assert replace(EXAMPLE, **changes).receipt != EXAMPLE.receipt
