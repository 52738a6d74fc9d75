"""Notes, keys, checkpoints and cosignatures against published vectors and their refusals."""

from __future__ import annotations

import base64

import pytest

from protocols.crypto.signatures import BadSignatureError
from protocols.errors import MalformedMessageError
from protocols.tlog import note as note_module
from protocols.tlog.checkpoint import Checkpoint, sign_checkpoint
from protocols.tlog.cosignature import (
    cosign,
    open_checkpoint,
    signed_message,
    signed_message_ml_dsa,
    verify_cosignature,
)
from protocols.tlog.merkle import EMPTY_ROOT
from protocols.tlog.note import (
    MAX_SIGNATURES,
    KeyRing,
    KeyType,
    Note,
    SignatureLine,
    SignerKey,
    VerifierKey,
    key_id,
    open_note,
    sign_note,
)
from tests.support.tlog import LOG, NOW, WITNESSES, b64, formats, signed, witness_vectors

NOTES = formats()["signed_note"]
VKEYS = formats()["vkeys"]
OWN = formats()["own_log_600"]


def ring(*vkeys, ml_dsa=False):
    return KeyRing.of(VerifierKey.parse(text, ml_dsa=ml_dsa) for text in vkeys)


def signers(row):
    """Who signed the note of a row; None if it is refused."""
    whole = row["note"]
    if isinstance(whole, dict):
        whole = whole["text"] + whole["repeat_line"] * whole["times"]
    try:
        good = open_note(Note.parse(whole.encode()), ring(*row["vkeys"]))
    except (MalformedMessageError, BadSignatureError):
        return None
    return [signature.key.name for signature in good]


def wrong_rows():
    want = {
        row["name"]: row["signers"] if row["want"] == "accept" else None for row in NOTES["open"]
    }
    assert len(want) == 12
    return [row["name"] for row in NOTES["open"] if signers(row) != want[row["name"]]]


def test_every_note_is_judged_as_its_source_says():
    assert wrong_rows() == []


def test_the_notes_convict_a_verifier_that_believes(monkeypatch):
    monkeypatch.setattr(note_module, "check_ed25519", lambda *_args: None)
    assert wrong_rows() == ["known key, bad signature"]


def test_a_note_that_is_not_utf8_is_refused():
    with pytest.raises(MalformedMessageError, match="UTF-8"):
        Note.parse(b64(NOTES["note_with_invalid_utf8_base64"]))


def test_signing_makes_the_published_line_and_private_keys_survive_a_round_trip():
    row = NOTES["sign"]
    signer = SignerKey.parse_private(row["skey"])

    assert signer.verifier.to_text() == row["vkey"]
    assert signer.to_private() == row["skey"]
    note = sign_note(row["text"], signer)
    assert note.to_bytes().decode() == row["text"] + "\n" + row["must_produce_line"]
    assert Note.parse(note.to_bytes()) == note
    assert row["skey"].rsplit("+", 1)[1] not in repr(signer)
    assert repr(signer.seed) not in repr(signer)


def test_the_example_of_the_specification():
    row = NOTES["c2sp_example"]
    good = open_note(Note.parse(row["note"].encode()), ring(row["vkey"]))
    assert [(g.key.name, g.time) for g in good] == [("example.com/foo", None)]


@pytest.mark.parametrize("row", VKEYS["good"], ids=lambda row: row["name"])
def test_good_vkeys(row):
    key = VerifierKey.parse(row["vkey"])
    assert key == VerifierKey(
        name=row["name"], type=KeyType(row["type"]), public_key=b64(row["public_key"])
    )
    assert key.key_id.hex() == row["key_id_hex"]
    assert key.to_text() == row["vkey"]


@pytest.mark.parametrize("row", VKEYS["bad"], ids=lambda row: row["why"])
def test_bad_vkeys(row):
    with pytest.raises(MalformedMessageError):
        VerifierKey.parse(row["vkey"])


def test_a_mangled_vkey_is_refused():
    good = VKEYS["good"][0]["vkey"]
    mangled = {good[i:j] for i in range(len(good)) for j in range(i, len(good) + 1)} - {good}
    mangled |= {good[:i] + chr(ord(good[i]) + 1) + good[i + 1 :] for i in range(len(good))}
    for text in mangled:
        with pytest.raises(MalformedMessageError):
            VerifierKey.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "PRIVATE+KEY+",
        NOTES["sign"]["vkey"],
        NOTES["sign"]["skey"].replace("c74f20a3", "c74f20a4"),
        NOTES["sign"]["skey"][:-4],
        NOTES["sign"]["skey"] + "\n",
        "PRIVATE+KEY+AYEKFALVFGyNhPJEMzD1QIDr Y7hfZx09iUvxdXHKDFz",
    ],
)
def test_bad_private_keys_are_refused_and_not_repeated(text):
    with pytest.raises(MalformedMessageError) as refusal:
        SignerKey.parse_private(text)
    assert "AYEKFALVF" not in str(refusal.value)


def test_a_note_is_split_at_its_last_empty_line():
    note = sign_note("one\n\ntwo\n", LOG)
    assert Note.parse(note.to_bytes()) == note
    assert len(open_note(Note.parse(note.to_bytes()), KeyRing.of([LOG.verifier]))) == 1


def test_the_limits_of_a_note():
    good = signed(5)
    line = good.signatures[0]
    strangers = tuple(
        SignatureLine(name=f"s{i}", key_id=b"abcd", blob=b"x") for i in range(MAX_SIGNATURES - 1)
    )
    most = Note(text=good.text, signatures=(line, *strangers))
    assert Note.parse(most.to_bytes()) == most
    assert len(open_note(most, KeyRing.of([LOG.verifier]))) == 1

    more = Note(text=good.text, signatures=(line, *strangers, strangers[0]))
    with pytest.raises(MalformedMessageError, match="signature lines"):
        Note.parse(more.to_bytes())
    with pytest.raises(MalformedMessageError, match="1000000"):
        Note.parse(b"x" * 1_000_001)


@pytest.mark.parametrize(
    "tail",
    [
        "\u2014 a AAAAAA",  # too short: four bytes of id and nothing
        "\u2014  a AAAAAAA=",
        "\u2014 a  AAAAAAA=",
        "\u2014 a AAAAAAA= ",
        "- a AAAAAAA=",
        "\u2014 a+b AAAAAAA=",
        "\u2014 a\u00a0b AAAAAAA=",
        "\u2014 a AAAAAAA",  # no padding
        "\u2014 a AAAA====",
        "\u2014 a AAAAAA=A",
        "\u2014 a AAAA-AA=",
        "",
    ],
)
def test_lines_that_are_no_signatures(tail):
    with pytest.raises(MalformedMessageError):
        Note.parse(f"text\n\n{tail}\n".encode())


def test_a_second_spelling_of_a_signature_is_kept_and_is_no_good_signature():
    """A stranger's line may be spelled oddly; a configured key's may not."""
    good = signed(5)
    encoded = base64.b64encode(b"abcd" + bytes(64)).decode()
    assert encoded.endswith("A=")
    odd = f"\u2014 stranger {encoded[:-2]}B=\n"
    whole = good.to_bytes() + odd.encode()
    note = Note.parse(whole)
    assert note.to_bytes() == whole
    assert len(open_note(note, KeyRing.of([LOG.verifier]))) == 1

    line = good.signatures[0].to_text()
    assert line.endswith("=\n")
    assert not line.endswith("==\n")  # two unused bits
    last = line[-3]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    twin = line[:-3] + alphabet[alphabet.index(last) + 1] + "=\n"
    other = Note.parse((good.text + "\n" + twin).encode())
    assert other.signatures[0].blob == good.signatures[0].blob
    with pytest.raises(BadSignatureError, match="canonical"):
        open_note(other, KeyRing.of([LOG.verifier]))


# -- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("row", formats()["checkpoint_text"]["cases"], ids=lambda row: row["name"])
def test_checkpoint_text(row):
    if row["want"] == "accept":
        assert Checkpoint.parse(row["text"]).to_text() == row["text"]
    else:
        assert row["want"].startswith("refuse")
        with pytest.raises(MalformedMessageError):
            Checkpoint.parse(row["text"])


def test_the_checkpoint_of_the_specification():
    vectors = formats()["checkpoint_text"]
    note = Note.parse(vectors["c2sp_example"].encode())
    assert Checkpoint.parse(note.text).size == 20852163
    time = int.from_bytes(note.signatures[1].blob[:8], "big")
    assert time == vectors["c2sp_example_cosignature_time"]


def test_sixteen_checkpoints_of_tessera_byte_for_byte():
    log = formats()["tessera_log"]
    signer = SignerKey.parse_private(log["skey"])
    for size, want in enumerate(log["checkpoint_by_size"]):
        opened = open_checkpoint(want.encode(), ring(log["vkey"]), now=NOW)
        assert opened.checkpoint.size == size
        assert sign_checkpoint(opened.checkpoint, signer).to_bytes().decode() == want


def own_witness():
    return SignerKey(
        name="witness.cl-univ-1.example/w1",
        type=KeyType.ED25519_COSIGNATURE,
        seed=bytes.fromhex(OWN["witness_seed_hex"]),
    )


@pytest.mark.parametrize("size", [257, 600])
def test_the_checkpoints_that_go_accepted_are_made_and_opened_here(size):
    want = OWN[f"checkpoint_{size}"]
    keys = ring(OWN["log_vkey"], OWN["witness_vkey"])
    opened = open_checkpoint(want.encode(), keys, now=NOW)

    assert (opened.checkpoint.size, opened.log.name) == (size, OWN["origin"])
    assert [(c.key.name, c.time) for c in opened.cosignatures] == [(own_witness().name, NOW)]
    note = sign_checkpoint(opened.checkpoint, SignerKey.parse_private(OWN["log_skey"]))
    line = cosign(note.text, signer=own_witness(), time=NOW)
    assert note.to_bytes().decode() + line.to_text() == want
    assert own_witness().verifier.to_text() == OWN["witness_vkey"]


def test_a_checkpoint_needs_its_own_log():
    """A good signature by another configured log does not help."""
    other = SignerKey(name="other.example/log", type=KeyType.ED25519, seed=b"\x77" * 32)
    text = Checkpoint(origin=LOG.name, size=0, root=EMPTY_ROOT).to_text()
    keys = KeyRing.of([other.verifier, LOG.verifier])

    open_checkpoint(sign_note(text, LOG, other).to_bytes(), keys, now=NOW)
    with pytest.raises(BadSignatureError, match="no configured key of the log"):
        open_checkpoint(sign_note(text, other).to_bytes(), keys, now=NOW)


# -- cosignatures --------------------------------------------------------------------------------


def test_a_cosignature_byte_for_byte():
    row = witness_vectors()["cosignature"]["own"]
    text = row["checkpoint_text"]
    line = cosign(text, signer=own_witness(), time=row["time"])

    assert signed_message(text, row["time"]).decode() == row["signed_message"]
    assert line.to_text() == row["line"]
    assert verify_cosignature(own_witness().verifier, text, line.blob, now=NOW) == row["time"]


def test_the_time_of_a_published_cosignature():
    row = witness_vectors()["cosignature"]["timestamp_of"]
    line = SignatureLine.parse("\u2014 x " + row["line_base64"])
    assert int.from_bytes(line.blob[:8], "big") == row["time"]
    assert len(line.blob) == 8 + 64


def forged(time, text):
    """A cosignature with any time, which ``cosign`` would not make."""
    signer = WITNESSES["w1"]
    return time.to_bytes(8, "big") + signer.sign(signed_message(text, time))


TEXT = signed(5).text


@pytest.mark.parametrize(
    ("why", "blob", "words"),
    [
        ("time 0", forged(0, TEXT), "no usable time"),
        ("time above 2^63-1", forged(2**63, TEXT), "no usable time"),
        ("six minutes ahead", forged(NOW + 301, TEXT), "ahead"),
        ("63 bytes", forged(NOW, TEXT)[:-1], "does not have 64 bytes"),
        ("65 bytes", forged(NOW, TEXT) + b"\0", "does not have 64 bytes"),
        ("no time", b"", "does not have 64 bytes"),
        ("another text", forged(NOW, signed(6).text), "does not verify"),
        ("time changed", (NOW - 1).to_bytes(8, "big") + forged(NOW, TEXT)[8:], "not verify"),
    ],
)
def test_cosignatures_that_are_refused(why, blob, words):
    key = WITNESSES["w1"].verifier
    with pytest.raises(BadSignatureError, match=words):
        verify_cosignature(key, TEXT, blob, now=NOW)
    line = SignatureLine(name=key.name, key_id=key.key_id, blob=blob or b"\0")
    spoiled = Note(text=TEXT, signatures=(*signed(5).signatures, line))
    with pytest.raises(BadSignatureError):  # and the whole note with it
        open_checkpoint(spoiled.to_bytes(), KeyRing.of([LOG.verifier, key]), now=NOW)


def test_five_minutes_ahead_is_taken():
    key = WITNESSES["w1"].verifier
    assert verify_cosignature(key, TEXT, forged(NOW + 300, TEXT), now=NOW) == NOW + 300


def test_a_cosignature_is_no_signature_of_a_log():
    """The same line presented as type 0x01: the id is another's, and the bytes do not verify."""
    witness = WITNESSES["w1"]
    posing = VerifierKey(
        name=witness.name, type=KeyType.ED25519, public_key=witness.verifier.public_key
    )
    line = cosign(TEXT, signer=witness, time=NOW)
    with pytest.raises(BadSignatureError, match="configured key"):
        open_note(Note(text=TEXT, signatures=(line,)), KeyRing.of([posing]))
    renamed = SignatureLine(name=line.name, key_id=posing.key_id, blob=line.blob)
    with pytest.raises(BadSignatureError, match="64 bytes"):
        open_note(Note(text=TEXT, signatures=(renamed,)), KeyRing.of([posing]))


def test_a_witness_twice_counts_once_with_its_latest_time():
    note = signed(5, "w1", time=NOW - 100)
    later = cosign(note.text, signer=WITNESSES["w1"], time=NOW)
    twice = Note(text=note.text, signatures=(later, *note.signatures))
    keys = KeyRing.of([LOG.verifier, WITNESSES["w1"].verifier])
    opened = open_checkpoint(twice.to_bytes(), keys, now=NOW)
    assert [c.time for c in opened.cosignatures] == [NOW]


# -- ML-DSA-44: off ------------------------------------------------------------------------------


def test_type_6_keys_are_refused_and_their_lines_ignored_unless_switched_on():
    row = OWN["mldsa44"]
    with_line = (OWN["checkpoint_600"] + row["cosignature_line_for_checkpoint_600"]).encode()
    if not with_line.endswith(b"\n"):
        with_line += b"\n"

    with pytest.raises(MalformedMessageError, match="switched off"):
        VerifierKey.parse(row["vkey"])
    with pytest.raises(MalformedMessageError, match="switched off"):
        SignerKey(name="w", type=KeyType.ML_DSA_44_COSIGNATURE, seed=bytes(32))
    off = open_checkpoint(with_line, ring(OWN["log_vkey"], OWN["witness_vkey"]), now=NOW)
    assert len(off.cosignatures) == 1

    keys = ring(OWN["log_vkey"], OWN["witness_vkey"], row["vkey"], ml_dsa=True)
    on = open_checkpoint(with_line, keys, now=NOW)
    assert [c.time for c in on.cosignatures] == [NOW, NOW]
    name = keys.keys[2].name
    message = signed_message_ml_dsa(on.checkpoint, NOW, name)
    assert message.hex() == row["signed_message_hex"]
    line = on.note.signatures[2]
    with pytest.raises(BadSignatureError, match="does not verify"):
        verify_cosignature(keys.keys[2], signed(5).text, line.blob, now=NOW)
    with pytest.raises(BadSignatureError, match="2420"):
        verify_cosignature(keys.keys[2], on.note.text, line.blob[:-1], now=NOW)


# -- traps ---------------------------------------------------------------------------------------


def test_8_a_log_key_must_be_named_like_its_origin():
    other = Checkpoint(origin="log.minga.example/other", size=0, root=EMPTY_ROOT)
    with pytest.raises(MalformedMessageError, match="is named"):
        sign_checkpoint(other, LOG)


@pytest.mark.parametrize("extension", ["extra\n", "extra", "\n"])
def test_9_extension_lines_are_refused_even_when_signed(extension):
    text = signed(5).text + extension + ("" if extension.endswith("\n") else "\n")
    note = sign_note(text, LOG)
    for foreign in (False, True):
        with pytest.raises(MalformedMessageError):
            open_checkpoint(note.to_bytes(), KeyRing.of([LOG.verifier]), now=NOW, foreign=foreign)


def test_10_one_raw_key_has_one_name_and_one_use():
    public = LOG.verifier.public_key
    for type_, name in ((KeyType.ED25519_COSIGNATURE, LOG.name), (KeyType.ED25519, "other")):
        twin = VerifierKey(name=name, type=type_, public_key=public)
        assert twin.key_id != LOG.verifier.key_id  # so only the raw key can tell
        with pytest.raises(MalformedMessageError, match="twice"):
            KeyRing.of([LOG.verifier, twin])


def test_two_configured_keys_with_one_name_and_id_are_refused_at_load():
    """A four-byte collision, as far as the ring can see: the same key again."""
    assert NOTES["two_configured_keys_with_same_name_and_id"].startswith("refuse at load")
    with pytest.raises(MalformedMessageError, match="same name and id"):
        KeyRing.of([LOG.verifier, LOG.verifier])


def test_13_a_plus_inside_the_base64_of_a_key_is_not_a_separator():
    found = None
    for i in range(256):
        signer = SignerKey(name="n", type=KeyType.ED25519, seed=bytes([i]) * 32)
        encoded = base64.b64encode(b"\x01" + signer.verifier.public_key).decode()
        private = base64.b64encode(b"\x01" + signer.seed).decode()
        if "+" in encoded and "+" in private:
            found = signer
            break
    assert found is not None  # else nothing was tested
    assert VerifierKey.parse(found.verifier.to_text()) == found.verifier
    assert SignerKey.parse_private(found.to_private()) == found


def test_16_thirty_three_cosignatures_of_either_type_fit_in_a_note():
    """33 lines of type 0x04 are 4 kB, of type 0x06 more than 100 kB: both are read."""
    for bytes_, least, most in ((8 + 64, 3_000, 5_000), (8 + 2420, 100_000, 115_000)):
        lines = tuple(
            SignatureLine(name=f"w{i:02}.example/w1", key_id=b"abcd", blob=bytes(bytes_))
            for i in range(33)
        )
        note = Note(text=TEXT, signatures=signed(5).signatures + lines)
        size = sum(len(line.to_text().encode()) for line in lines)
        assert least < size < most
        assert Note.parse(note.to_bytes()) == note


def test_17_a_checkpoint_note_has_exactly_one_empty_line():
    """Readers that split at the first empty line and those that split at the last one agree."""
    for size in (0, 1, 600):
        assert signed(size, "w1", "w2").to_bytes().count(b"\n\n") == 1
    with pytest.raises(MalformedMessageError):
        Checkpoint.parse("log.minga.example/x\n\n1\n" + base64.b64encode(bytes(32)).decode() + "\n")


def test_a_key_id_is_the_hash_of_name_type_and_key():
    row = VKEYS["good"][0]
    public = b64(row["public_key"])
    assert key_id(row["name"], KeyType.ED25519, public).hex() == row["key_id_hex"]
    assert key_id(row["name"], KeyType.ED25519_COSIGNATURE, public).hex() != row["key_id_hex"]
