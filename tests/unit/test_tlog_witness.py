"""A witness's answers, in the order of its checks: three foreign scripts and one of our own."""

from __future__ import annotations

import pytest

from protocols.crypto.signatures import BadSignatureError
from protocols.errors import MalformedMessageError
from protocols.tlog import witness as witness_module
from protocols.tlog.checkpoint import Checkpoint, sign_checkpoint
from protocols.tlog.cosignature import open_checkpoint
from protocols.tlog.merkle import leaf_hash
from protocols.tlog.note import KeyRing, KeyType, Note, SignatureLine, SignerKey, VerifierKey
from protocols.tlog.proofs import make_consistency, root_of, stored
from protocols.tlog.witness import (
    Head,
    Request,
    add_checkpoint,
    add_lines,
    monitoring_path,
    parse_answer,
    write_request,
)
from tests.support.tlog import (
    LOG,
    NOW,
    ORIGIN,
    WITNESSES,
    big_tree,
    entries_of,
    signed,
    witness_vectors,
)

VECTORS = witness_vectors()
W1 = WITNESSES["w1"]
RING = KeyRing.of([W1.verifier])


class Witness:
    """A witness in memory that does what the caller owes: store before the answer leaves."""

    def __init__(self, origin, vkey):
        self.logs = {origin: KeyRing.of([VerifierKey.parse(vkey)])}
        self.latest = {}

    def post(self, body):
        if isinstance(body, dict):  # a long body, told in short
            body = body["first"] + body["repeat_line"] * body["times"] + body["then"]
        if isinstance(body, str):
            body = body.encode()
        answer = add_checkpoint(body, logs=self.logs, latest=self.latest, signer=W1, now=NOW)
        assert (answer.store is not None) == (answer.status == 200)
        if answer.store is not None:
            request = Request.parse(body)
            self.latest[request.checkpoint.origin] = answer.store
            (found,) = parse_answer(answer.body, text=request.note.text, ring=RING, now=NOW)
            assert found[1].time == NOW
        return answer


def scripts():
    """(name, origin, vkey, steps) of every script; each begins with a fresh witness."""
    for name in ("litewitness_script", "sumdb_first_contact", "own_script"):
        row = VECTORS[name]
        yield name, row["origin"], row["log_vkey"], row["steps"]
    omni = VECTORS["omniwitness_cases"]
    for case in omni["cases"]:
        yield case["name"], omni["origin"], omni["log_vkey"], case["steps"]


def differences():
    found = []
    for name, origin, vkey, steps in scripts():
        witness = Witness(origin, vkey)
        for number, step in enumerate(steps, 1):
            answer = witness.post(step["body"])
            if answer.status != step["status"]:
                found.append((name, number, step["status"], answer.status, answer.why))
            elif "answer" in step and (answer.body.decode(), answer.content_type) != (
                step["answer"],
                "text/x.tlog.size",
            ):
                found.append((name, number, step["answer"], answer.body, answer.content_type))
    return found


def test_every_script_is_answered_as_its_source_says():
    counted = {name: len(steps) for name, _, _, steps in scripts()}
    assert (counted["litewitness_script"], counted["own_script"], len(counted)) == (9, 27, 12)
    assert differences() == []


@pytest.mark.parametrize(
    ("part", "planted", "status"),
    [
        ("open_note", lambda *_args: (), 403),
        ("verify_consistency", lambda **_args: None, 422),
        ("_check_extends", lambda *_args: None, 422),
        ("EMPTY_ROOT", bytes([1]) * 32, 422),
    ],
)
def test_the_scripts_convict_a_planted_mistake(monkeypatch, part, planted, status):
    monkeypatch.setattr(witness_module, part, planted)
    assert status in {want for _, _, want, _, _ in differences()}


@pytest.mark.parametrize("body", VECTORS["omniwitness_cases"]["body_parse_refuse"])
def test_bodies_that_do_not_parse(body):
    with pytest.raises(MalformedMessageError):
        Request.parse(body.encode())
    omni = VECTORS["omniwitness_cases"]
    assert Witness(omni["origin"], omni["log_vkey"]).post(body).status == 400


HASH = "A" * 43 + "=\n"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"old 0\n",
        b"old 0\n\n",
        b"old 9223372036854775808\n\n" + signed(5).to_bytes(),
        b"old 0\r\n\n" + signed(5).to_bytes(),
        b"old 0\n" + HASH.encode() * 64 + b"\n" + signed(5).to_bytes(),
        b"old 0\n\n" + signed(5).to_bytes()[:-1],
        b"old 0\n\n" + signed(5).to_bytes().replace(b"\n5\n", b"\n05\n"),
        b"old 0\n\n\n" + signed(5).to_bytes(),
        b"\xff",
        b"x" * 2_000_000,
    ],
)
def test_more_bodies_that_do_not_parse(body):
    assert Witness(ORIGIN, LOG.verifier.to_text()).post(body).status == 400


def test_15_404_comes_before_403():
    """An unknown origin and a spoiled signature together: the origin is what is answered."""
    witness = Witness("log.minga.example/other", LOG.verifier.to_text())
    good = signed(5)
    line = good.signatures[0]
    spoiled = Note(
        text=good.text,
        signatures=(SignatureLine(name=line.name, key_id=line.key_id, blob=bytes(64)),),
    )
    body = write_request(old=0, proof=(), checkpoint=spoiled.to_bytes())
    assert witness.post(body).status == 404
    assert Witness(ORIGIN, LOG.verifier.to_text()).post(body).status == 403


def test_a_body_survives_a_round_trip():
    proof = make_consistency(big_tree(), 257, 600)
    body = write_request(old=257, proof=proof, checkpoint=signed(600).to_bytes())
    request = Request.parse(body)
    assert (request.old, request.proof, request.note) == (257, proof, signed(600))


@pytest.mark.parametrize(
    ("old", "new"), [(1, 255), (255, 256), (256, 257), (257, 65_535), (65_536, 70_000)]
)
def test_a_witness_follows_the_log_over_the_boundaries(old, new):
    witness = Witness(ORIGIN, LOG.verifier.to_text())
    steps = ((0, old, ()), (old, new, make_consistency(big_tree(), old, new)))
    for was, size, proof in steps:
        body = write_request(old=was, proof=proof, checkpoint=signed(size).to_bytes())
        assert witness.post(body).status == 200
    assert witness.latest[ORIGIN] == Head(size=new, root=root_of(big_tree(), new))


def test_of_two_branches_a_witness_signs_one():
    witness = Witness(ORIGIN, LOG.verifier.to_text())
    entries = [*entries_of(6), b"FORGED", b"leaf 7"]
    forged = stored([leaf_hash(entry) for entry in entries])
    branch = sign_checkpoint(
        Checkpoint(origin=ORIGIN, size=8, root=root_of(forged, 8)), LOG
    ).to_bytes()
    truth = signed(8).to_bytes()
    before = write_request(old=0, proof=(), checkpoint=signed(5).to_bytes())
    bodies = [
        write_request(old=5, proof=make_consistency(forged, 5, 8), checkpoint=branch),
        write_request(old=5, proof=make_consistency(big_tree(), 5, 8), checkpoint=truth),
    ]

    for first, second in (bodies, bodies[::-1]):
        witness.latest.clear()
        assert [witness.post(body).status for body in (before, first, second)] == [200, 200, 409]
    witness.latest.clear()
    witness.post(before)
    witness.post(bodies[1])
    again = write_request(old=8, proof=(), checkpoint=branch)
    assert witness.post(again).status == 422


def test_the_race_of_two_requests_shows_why_compare_and_store_are_one_step():
    """Both requests of the published race are good for the same old head. In one transaction
    each, the second finds another head; decided on a stale head, both would be signed."""
    steps = VECTORS["litewitness_script"]["steps"]
    row = VECTORS["litewitness_script"]
    witness = Witness(row["origin"], row["log_vkey"])
    assert witness.post(steps[0]["body"]).status == 200
    stale = dict(witness.latest)
    assert witness.post(steps[6]["body"]).status == 200  # 1 to 5 overtakes 1 to 3
    late = steps[5]["body"].encode()
    args = {"logs": witness.logs, "signer": W1, "now": NOW}

    assert add_checkpoint(late, latest=stale, **args).status == 200  # what must not happen
    answer = add_checkpoint(late, latest=witness.latest, **args)
    assert (answer.status, answer.body, answer.store) == (409, b"5\n", None)
    assert witness.latest[row["origin"]].size == 5
    assert witness.latest[row["origin"]].root.hex() in row["race"]["rule"]


def test_where_a_witness_shows_its_checkpoint():
    row = VECTORS["own_script"]["monitoring_path"]
    assert monitoring_path(row["origin"]) == row["path"]


# -- the caller of a witness ---------------------------------------------------------------------


def test_an_answer_goes_under_the_checkpoint_once():
    note = signed(5)
    body = write_request(old=0, proof=(), checkpoint=note.to_bytes())
    answer = Witness(ORIGIN, LOG.verifier.to_text()).post(body)
    lines = [line for line, _ in parse_answer(answer.body, text=note.text, ring=RING, now=NOW)]
    cosigned = add_lines(add_lines(note, lines), lines)

    assert len(cosigned.signatures) == 2
    keys = KeyRing.of([LOG.verifier, W1.verifier])
    opened = open_checkpoint(cosigned.to_bytes(), keys, now=NOW)
    assert [c.key.name for c in opened.cosignatures] == [W1.name]


def _twin(line):
    """The same signature in another spelling: one of the unused bits is set."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    body = line.rstrip("=\n")
    return body[:-1] + alphabet[alphabet.index(body[-1]) + 1] + line[len(body) :]


def test_answers_that_are_refused():
    note, other = signed(5, "w1", "w2"), signed(6, "w1")
    good, stranger = note.signatures[1], note.signatures[2]
    zero = SignatureLine(name=good.name, key_id=good.key_id, blob=bytes(8) + good.blob[8:])

    assert len(parse_answer(good.to_text().encode(), text=note.text, ring=RING, now=NOW)) == 1
    both = (stranger.to_text() + good.to_text()).encode()
    ((line, _),) = parse_answer(both, text=note.text, ring=RING, now=NOW)
    assert line == good
    for bad in (zero, stranger, other.signatures[1], note.signatures[0]):
        with pytest.raises(BadSignatureError):
            parse_answer(bad.to_text().encode(), text=note.text, ring=RING, now=NOW)
    text = good.to_text()
    with pytest.raises(BadSignatureError, match="canonical"):
        parse_answer(_twin(text).encode(), text=note.text, ring=RING, now=NOW)
    for body in ("", "\n", text[:-1], "\n" + text, text + "\n", text * 65, "200 OK\n"):
        with pytest.raises(MalformedMessageError):
            parse_answer(body.encode(), text=note.text, ring=RING, now=NOW)


def test_a_witness_cannot_use_the_key_of_a_log():
    body = write_request(old=0, proof=(), checkpoint=signed(5).to_bytes())
    logs = {ORIGIN: KeyRing.of([LOG.verifier])}
    wrong = SignerKey(name="w", type=KeyType.ED25519, seed=bytes(32))
    with pytest.raises(ValueError, match="type 0x04"):
        add_checkpoint(body, logs=logs, latest={}, signer=wrong, now=NOW)
    with pytest.raises(ValueError, match="time"):
        add_checkpoint(body, logs=logs, latest={}, signer=W1, now=0)
