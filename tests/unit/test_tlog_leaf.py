"""Leaves: our vector byte for byte, DSSE's own, refusals, chains, and people who stay out."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from protocols.canonical import canonical_bytes, parse_canonical
from protocols.crypto.signatures import BadSignatureError, public_bytes
from protocols.errors import MalformedMessageError
from protocols.identifiers import Digest
from protocols.tlog import leaf as leaf_module
from protocols.tlog.leaf import (
    FIRST_PREV,
    KINDS,
    MAX_LEAF,
    PAYLOAD_TYPE,
    BrokenChainError,
    ChainHead,
    Statement,
    extend_chain,
    key_id_of,
    open_leaf,
    pae,
    pseudonym,
    sign_leaf,
)
from tests.support.tlog import formats

VECTOR = formats()["dsse_and_leaf"]["leaf"]
JCS = formats()["jcs"]
KEY = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(VECTOR["signer_seed_hex"]))
KEYS = {key_id_of(public_bytes(KEY)): public_bytes(KEY)}
STATEMENT = Statement.parse(VECTOR["statement_jcs"].encode())


def test_our_leaf_byte_for_byte():
    plan = canonical_bytes(VECTOR["plan"])
    assert plan.decode() == VECTOR["plan_jcs"]
    assert hashlib.sha256(plan).hexdigest() == VECTOR["plan_sha256"] == STATEMENT.digest

    leaf = sign_leaf(STATEMENT, KEY)
    assert STATEMENT.to_bytes().decode() == VECTOR["statement_jcs"]
    assert leaf.signer == VECTOR["keyid_sha256_of_spki_der"]
    assert leaf.entry.decode() == VECTOR["entry"]
    assert len(leaf.entry) == VECTOR["entry_length"]
    assert leaf.hash == VECTOR["leaf_hash_hex"]
    assert open_leaf(leaf.entry, KEYS) == leaf
    assert (STATEMENT.kind, STATEMENT.seq, STATEMENT.seen.size) == ("round.join", 7, 600)
    assert STATEMENT.time == datetime(2026, 12, 1, 2, tzinfo=UTC)


def test_the_vector_of_dsse():
    row = formats()["dsse_and_leaf"]["dsse"]
    message = pae(row["payload_type"], row["payload"].encode())
    assert message.decode() == row["pae"]
    raw = base64.b64decode(row["sig_raw_r_s"])
    signature = encode_dss_signature(
        int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big")
    )
    numbers = ec.EllipticCurvePublicNumbers(int(row["p256_x"]), int(row["p256_y"]), ec.SECP256R1())
    numbers.public_key().verify(signature, message, ec.ECDSA(hashes.SHA256()))


def test_the_encoding_counts_bytes_and_not_characters():
    assert pae("é", "ñ".encode()) == b"DSSEv1 2 \xc3\xa9 2 \xc3\xb1"


# -- refusals of the envelope --------------------------------------------------------------------


def envelope(**changes):
    top = json.loads(VECTOR["entry"])
    top.update(changes)
    return canonical_bytes(top)


def resigned(payload, key=KEY, payload_type=PAYLOAD_TYPE):
    """A good envelope around any payload."""
    sig = base64.b64encode(key.sign(pae(payload_type, payload))).decode()
    return envelope(
        payload=base64.b64encode(payload).decode(),
        payloadType=payload_type,
        signatures=[{"keyid": key_id_of(public_bytes(key)), "sig": sig}],
    )


GOOD = json.loads(VECTOR["entry"])["signatures"][0]


@pytest.mark.parametrize(
    ("why", "entry"),
    [
        ("not JSON", b"{"),
        ("white space", VECTOR["entry"].encode() + b"\n"),
        ("keys in another order", json.dumps(json.loads(VECTOR["entry"])).encode()),
        ("a key twice", VECTOR["entry"].replace("{", '{"payload":"",', 1).encode()),
        ("two signatures", envelope(signatures=[GOOD, GOOD])),
        ("no signature", envelope(signatures=[])),
        ("signatures no list", envelope(signatures=GOOD)),
        ("another field", envelope(more=1)),
        ("certificate in the signature", envelope(signatures=[{**GOOD, "cert": "x"}])),
        ("payload no text", envelope(payload=1)),
        ("payload not base64", envelope(payload="!")),
        ("URL-safe base64", envelope(payload="__8=")),
        ("keyid in upper case", envelope(signatures=[{**GOOD, "keyid": GOOD["keyid"].upper()}])),
        ("another payload type", resigned(STATEMENT.to_bytes(), payload_type="text/plain")),
        ("a list", b"[]"),
        ("over 32 KiB", envelope(payload="A" * (MAX_LEAF + 4))),
        ("not UTF-8", b"\xff"),
    ],
)
def test_envelopes_that_are_refused(why, entry):
    with pytest.raises(MalformedMessageError):
        open_leaf(entry, KEYS)


def test_signatures_that_are_refused():
    stranger = Ed25519PrivateKey.from_private_bytes(bytes(32))
    with pytest.raises(BadSignatureError, match="no member's key"):
        open_leaf(resigned(STATEMENT.to_bytes(), stranger), KEYS)
    foreign = json.loads(resigned(STATEMENT.to_bytes(), stranger))["signatures"][0]["sig"]
    with pytest.raises(BadSignatureError, match="does not verify"):
        open_leaf(envelope(signatures=[{**GOOD, "sig": foreign}]), KEYS)
    with pytest.raises(BadSignatureError, match="64 bytes"):
        open_leaf(envelope(signatures=[{**GOOD, "sig": ""}]), KEYS)
    other = replace(STATEMENT, seq=8).to_bytes()
    with pytest.raises(BadSignatureError, match="does not verify"):
        open_leaf(envelope(payload=base64.b64encode(other).decode()), KEYS)
    with pytest.raises(ValueError, match="another key's id"):
        open_leaf(VECTOR["entry"].encode(), {next(iter(KEYS)): public_bytes(stranger)})


def test_the_refusals_convict_a_reader_that_believes(monkeypatch):
    other = envelope(payload=base64.b64encode(replace(STATEMENT, seq=8).to_bytes()).decode())
    monkeypatch.setattr(leaf_module, "check_ed25519", lambda *_args: None)
    assert open_leaf(other, KEYS).statement.seq == 8


# -- refusals of the statement -------------------------------------------------------------------


def statement(**changes):
    top = json.loads(VECTOR["statement_jcs"])
    for name, value in changes.items():
        where = top if name in top else top["predicate"]
        where[name] = value
    return canonical_bytes(top)


SUBJECT = json.loads(VECTOR["statement_jcs"])["subject"]
EMPTY = base64.b64encode(hashlib.sha256(b"").digest()).decode()


@pytest.mark.parametrize(
    ("why", "data"),
    [
        ("another type", statement(_type="https://in-toto.io/Statement/v0.1")),
        ("two subjects", statement(subject=SUBJECT * 2)),
        ("no subject", statement(subject=[])),
        ("subject with sha512", statement(subject=[{**SUBJECT[0], "digest": {"sha512": "0"}}])),
        ("subject without a name", statement(subject=[{**SUBJECT[0], "name": ""}])),
        ("another base", statement(predicateType="https://x.example/predicate/round.join/v1")),
        ("unknown kind", statement(predicateType="https://minga.example/predicate/joke/v1")),
        ("version 2", statement(predicateType="https://minga.example/predicate/round.join/v2")),
        ("seq 0", statement(seq=0)),
        ("seq true", statement(seq=True)),
        ("seq as text", statement(seq="7")),
        ("prev of 63 digits", statement(prev="0" * 63)),
        ("prev none", statement(prev=None)),
        ("seen without root", statement(seen={"size": 1})),
        ("seen negative", statement(seen={"size": -1, "root": EMPTY})),
        ("seen 0 with another root", statement(seen={"size": 0, "root": "A" * 43 + "="})),
        ("seen root of 31 bytes", statement(seen={"size": 1, "root": "A" * 42 + "=="})),
        ("time with an offset", statement(time="2026-12-01T02:00:00+00:00")),
        ("time with fractions", statement(time="2026-12-01T02:00:00.5Z")),
        ("no such day", statement(time="2026-02-30T02:00:00Z")),
        ("year 999", statement(time="0999-01-01T00:00:00Z")),
        ("predicate no object", statement(predicate=[])),
        ("predicate without seq", statement(predicate={"prev": FIRST_PREV})),
        ("white space", statement() + b" "),
        ("not canonical", VECTOR["statement_jcs"].replace(":7,", ":7.0,").encode()),
        ("NaN", VECTOR["statement_jcs"].replace('"seq":7', '"seq":NaN').encode()),
        ("lone surrogate", VECTOR["statement_jcs"].replace("fed/demo", "\\ud800").encode()),
    ],
)
def test_statements_that_are_refused(why, data):
    assert Statement.parse(statement()) == STATEMENT
    with pytest.raises(MalformedMessageError):
        Statement.parse(data)
    with pytest.raises(MalformedMessageError):
        open_leaf(resigned(data), KEYS)


def test_seen_may_be_the_empty_log():
    assert Statement.parse(statement(seen={"size": 0, "root": EMPTY})).seen.size == 0


def test_every_kind_has_a_leaf():
    for kind in KINDS:
        leaf = sign_leaf(replace(STATEMENT, kind=kind), KEY)
        assert open_leaf(leaf.entry, KEYS).statement.kind == kind
    assert len(KINDS) == 30


def test_fields_are_kept_and_cannot_be_common_ones_or_changed():
    said = replace(STATEMENT, fields={"ready": ["a", "b"], "z": {"y": 1.5}})
    assert open_leaf(sign_leaf(said, KEY).entry, KEYS).statement.fields["z"] == {"y": 1.5}
    for name in ("seq", "prev", "seen", "time"):
        with pytest.raises(MalformedMessageError, match="common"):
            replace(STATEMENT, fields={name: 1})
    with pytest.raises(TypeError):
        said.fields["new"] = 1


def test_5_a_leaf_is_at_most_32_kib():
    def leaf(length):
        return sign_leaf(replace(STATEMENT, fields={"x": "a" * length}), KEY)

    length = 20_000
    step = 1024
    while step:  # the longest text that fits
        try:
            leaf(length + step)
        except MalformedMessageError:
            step //= 2
        else:
            length += step
    assert MAX_LEAF - 4 < len(leaf(length).entry) <= MAX_LEAF == 32 * 1024
    assert open_leaf(leaf(length).entry, KEYS).statement.fields["x"] == "a" * length
    with pytest.raises(MalformedMessageError, match="at most 32768"):
        leaf(length + 1)


# -- canonical JSON ------------------------------------------------------------------------------


def test_numbers_and_keys_of_rfc_8785():
    for row in JCS["numbers"]:
        (value,) = struct.unpack(">d", bytes.fromhex(row["ieee754_hex"]))
        assert canonical_bytes(value).decode() == row["text"]
    want = json.loads(JCS["sort_example_output"])
    assert set(want) == set(JCS["sort_example_input_keys"])
    shuffled = {key: want[key] for key in JCS["sort_example_input_keys"]}
    assert canonical_bytes(shuffled).decode() == JCS["sort_example_output"]


@pytest.mark.parametrize("value", [2**53, -(2**53), float("nan"), float("inf"), "\ud800"])
def test_12_what_json_cannot_say_exactly_is_refused(value):
    assert len(JCS["must_refuse"]) == 5  # the fifth, a duplicate key, is refused above
    with pytest.raises(MalformedMessageError):
        replace(STATEMENT, fields={"x": value})
    replace(STATEMENT, fields={"x": str(2**53)})
    replace(STATEMENT, fields={"x": 2**53 - 1})


def test_12_an_integer_of_2_to_the_53_in_bytes_is_refused():
    data = VECTOR["statement_jcs"].replace('"size":600', f'"size":{2**53}').encode()
    with pytest.raises(MalformedMessageError):
        Statement.parse(data)
    with pytest.raises(MalformedMessageError):
        parse_canonical(b'{"a":1,"a":1}')


# -- chains --------------------------------------------------------------------------------------


def chained(seq, prev, note="x"):
    return sign_leaf(replace(STATEMENT, seq=seq, prev=prev, fields={"note": note}), KEY)


def test_a_signer_s_leaves_are_a_chain_and_a_dropped_one_is_missed():
    first = chained(1, FIRST_PREV)
    second = chained(2, first.hash)
    third = chained(3, second.hash)

    head = extend_chain(None, first)
    assert head == ChainHead(seq=1, leaf=first.hash)
    assert extend_chain(head, first) is head  # a repeated leaf
    with pytest.raises(BrokenChainError):
        extend_chain(head, third)
    assert extend_chain(extend_chain(head, second), third).seq == 3
    for broken in (
        chained(2, FIRST_PREV),
        chained(1, FIRST_PREV, "another first"),
        chained(3, first.hash),
        chained(2, Digest("f" * 64)),
    ):
        with pytest.raises(BrokenChainError):
            extend_chain(head, broken)
    for not_first in (second, chained(1, first.hash), chained(7, FIRST_PREV)):
        with pytest.raises(BrokenChainError):
            extend_chain(None, not_first)


# -- 18: people ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"by": "maria.perez@example.org"},
        {"deep": [{"er": "contact: j-d+x@mail.example.com."}]},
        {"ana@example.cl": 1},
    ],
)
def test_18_an_address_of_a_person_is_refused_and_not_repeated(fields):
    with pytest.raises(MalformedMessageError, match="e-mail") as refusal:
        replace(STATEMENT, fields=fields)
    assert "@" not in str(refusal.value)
    data = statement(predicate={**json.loads(VECTOR["statement_jcs"])["predicate"], **fields})
    with pytest.raises(MalformedMessageError, match="e-mail"):
        open_leaf(resigned(data), KEYS)


def test_18_names_of_images_are_no_addresses():
    replace(STATEMENT, fields={"image": "registry.example/minga@sha256:" + "0" * 64})


def test_18_a_pseudonym_needs_its_salt():
    value = b"Maria Perez"
    salt = bytes(range(32))
    assert pseudonym(salt, value) == hashlib.sha256(salt + value).hexdigest()
    assert pseudonym(bytes(32), value) != pseudonym(salt, value)
    with pytest.raises(ValueError, match="32 bytes"):
        pseudonym(b"", value)
