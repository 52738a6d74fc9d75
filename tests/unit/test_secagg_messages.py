"""Messages: bytes are pinned, parsers are strict and raise one error, secrets do not print."""

from __future__ import annotations

import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from protocols.canonical import canonical_bytes
from protocols.errors import MalformedMessageError
from protocols.secagg import coordinator as hub
from protocols.secagg import messages, states, vectors
from protocols.secagg.keys import AttemptKeys
from protocols.secagg.messages import (
    Abort,
    Commit,
    Complaint,
    Deal,
    DealBundle,
    DealOk,
    Delivery,
    Go,
    Ready,
    Reveal,
    Start,
    Survivors,
    Transcript,
    Upload,
    signed_from_bytes,
)
from protocols.secagg.states import state_from_bytes
from tests.support.secagg import World, node_name

GOLDEN = Path(__file__).parents[2] / "protocols" / "vectors"


@pytest.fixture(scope="module")
def played() -> World:
    world = World.make(4, d=8)
    world.transcript = world.up_to_open(lost=[node_name(2)])
    world.go = hub.make_go(world.oks)
    return world


def all_messages(world: World) -> list[tuple[type, bytes]]:
    """One of each kind of message, with the class that reads it."""
    first = node_name(1)
    return [
        (Start, world.start.to_bytes()),
        (DealBundle, world.bundles[first].to_bytes()),
        (Delivery, world.deliveries[first].to_bytes()),
        (Go, world.go.to_bytes()),
        (Survivors, world.survivors.to_bytes()),
        (messages.CommitCertificate, world.certificate.to_bytes()),
        (Transcript, world.transcript.to_bytes()),
    ]


def all_signed(world: World) -> list[tuple[type, bytes]]:
    first = node_name(1)
    return [
        (Ready, world.start.readys[0].to_bytes()),
        (Deal, world.bundles[first].deal.to_bytes()),
        (DealOk, world.oks[first].to_bytes()),
        (Upload, world.headers[first].to_bytes()),
        (Commit, world.commits[first].to_bytes()),
        (Reveal, world.reveals[first].to_bytes()),
    ]


def test_every_message_reads_back_as_itself(played):
    for cls, data in all_messages(played):
        assert cls.from_bytes(data).to_bytes() == data
    for cls, data in all_signed(played):
        assert signed_from_bytes(cls, data).to_bytes() == data


def mutations(value):
    """Values of the same document with one thing wrong, each with what is wrong."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield f"no {name}", {k: v for k, v in value.items() if k != name}
            for what, changed in mutations(inner):
                yield f"{name}: {what}", {**value, name: changed}
        yield "unknown field", {**value, "zz": 1}
    elif isinstance(value, list):
        if value:
            yield "twice", [*value, value[0]]
            for what, changed in mutations(value[0]):
                yield f"[0] {what}", [changed, *value[1:]]
        yield "not a list", {}
        yield "too many", value * 65 if value else [None] * 65
    elif isinstance(value, bool):
        yield "not a boolean", 1
    elif isinstance(value, int):
        yield "boolean", True
        yield "text", str(value)
        yield "negative", -1
        yield "float", value + 0.5
        yield "huge", 2**53 - 1
    elif isinstance(value, str):
        yield "empty", ""
        yield "number", 7
        yield "longer", value + "00"
        yield "upper case", value.upper() + "A"
        yield "null", None


def exempt(what: str) -> bool:
    """Changes after which the document is still well formed."""
    names = ("round", "node", "to", "of", "against", "federation", "reason")  # run/4, run/400
    return (
        what.endswith(tuple(f"{name}: longer" for name in names))
        or "seen_size: huge" in what
        or (what.endswith("longer") and ("sealed" in what or "checkpoint" in what))
        or "sealed: null" in what
        or (("path" in what or "rest" in what) and "twice" in what)
    )


def check_mutations(data: bytes, read) -> int:
    tried = 0
    for what, changed in mutations(json.loads(data)):
        if exempt(what):
            continue
        tried += 1
        try:
            changed_bytes = canonical_bytes(changed)
        except MalformedMessageError:
            continue
        try:
            read(changed_bytes)
        except MalformedMessageError:
            continue
        pytest.fail(f"accepted: {what}")
    return tried


def test_parsers_refuse_every_single_fault(played):
    tried = 0
    for cls, data in all_signed(played):
        tried += check_mutations(data, lambda raw, cls=cls: signed_from_bytes(cls, raw))
    for cls, data in all_messages(played):
        tried += check_mutations(data, cls.from_bytes)
    assert tried > 500


NOT_JSON = [b"", b"{", b"[]", b"null", b"1", b"\xff\xfe", b'{"a":1,"a":2}', b"NaN", b"[" * 5000]


@pytest.mark.parametrize("data", NOT_JSON, ids=range(len(NOT_JSON)))
def test_parsers_raise_one_error(data):
    readers = [cls.from_bytes for cls in (Start, DealBundle, Delivery, Go, Survivors, Transcript)]
    readers += [
        lambda raw, cls=cls: signed_from_bytes(cls, raw)
        for cls in (Ready, Deal, DealOk, Complaint, Upload, Commit, Abort, Reveal)
    ]
    for read in [*readers, state_from_bytes]:
        with pytest.raises(MalformedMessageError):
            read(data)


def test_a_document_has_one_form(played):
    for _, data in all_signed(played):
        loose = json.dumps(json.loads(data)).encode()  # same document, with spaces
        assert loose != data
        with pytest.raises(MalformedMessageError, match="canonical"):
            signed_from_bytes(Ready, loose)


def test_one_kind_is_never_read_as_another(played):
    kinds = all_signed(played)
    for cls, _ in kinds:
        for other, data in kinds:
            if other is not cls:
                with pytest.raises(MalformedMessageError, match="schema"):
                    signed_from_bytes(cls, data)


def test_an_abort_reason_is_a_code():
    attempt = World.make(3).attempt
    for reason in ("", "Free text with spaces", "x" * 65, "a\nb"):
        with pytest.raises(MalformedMessageError):
            Abort(
                federation=attempt.federation,
                round=attempt.round,
                attempt=1,
                node=node_name(1),
                roster_root=attempt.roster.root,
                reason=reason,
            )


# -- golden vectors ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(vectors.documents()))
def test_golden_vectors_are_what_the_generator_makes(name):
    assert json.loads((GOLDEN / name).read_bytes()) == json.loads(vectors.documents()[name])


def test_golden_messages_parse():
    found = json.loads((GOLDEN / "secagg-messages.json").read_bytes())
    for row in found["messages"]:
        data = bytes.fromhex(row["bytes"])
        if row["signed"]:
            assert signed_from_bytes(getattr(messages, row["kind"]), data).to_bytes() == data
        else:
            assert getattr(messages, row["kind"]).from_bytes(data).to_bytes() == data
    assert {row["kind"] for row in found["messages"]} == {
        "Ready",
        "Start",
        "Deal",
        "DealBundle",
        "Delivery",
        "DealOk",
        "Complaint",
        "Go",
        "Upload",
        "Survivors",
        "Commit",
        "CommitCertificate",
        "Abort",
        "AbortCertificate",
        "Reveal",
        "Transcript",
    }


def test_the_specification_states_the_real_sizes():
    """``COMMIT  ...  412 bytes`` in the text is the size of the golden message of that kind."""
    spec = (GOLDEN.parent / "spec" / "masked-update.md").read_text(encoding="utf-8")
    stated = {
        name: int(size)
        for name, size in re.findall(r"^([A-Z]+) .*?(\d+) bytes", spec, re.MULTILINE)
    }
    rows = json.loads((GOLDEN / "secagg-messages.json").read_bytes())["messages"]
    sizes = {row["kind"].upper(): len(row["bytes"]) // 2 for row in rows}
    assert stated.keys() == {"READY", "DEAL", "UPLOAD", "COMMIT", "ABORT"}
    assert stated == {name: sizes[name] for name in stated}


# -- secrets -----------------------------------------------------------------------------------

SECRET_FIELDS = {
    "seed",
    "ek_secret",
    "rk_secret",
    "self_seed",
    "noise_seed",
    "rk_randomness",
    "b_randomness",
    "salts",
    "rk_share",
    "b_share",
    "rk_salt",
    "b_salt",
    "share",
    "salt",
    "secret",
    "key",
}


def secrets_in(value) -> set[bytes]:
    """Every secret byte string anywhere in a value."""
    found: set[bytes] = set()
    if is_dataclass(value):
        for f in fields(value):
            inner = getattr(value, f.name)
            public_key = f.name == "key" and type(value).__name__ == "Member"
            if f.name in SECRET_FIELDS and isinstance(inner, bytes) and not public_key:
                found.add(inner)
            else:
                found |= secrets_in(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            found |= secrets_in(inner)
    elif isinstance(value, dict):
        for inner in value.values():
            found |= secrets_in(inner)
    return found


def test_no_secret_is_in_a_repr():
    """Every state that a node passes through, and every value that carries a secret."""
    world = World.make(4, d=8)
    seen = []

    class Watching(type(world.members[node_name(1)])):
        def do(self, move):
            seen.extend([move.state, move])
            return super().do(move)

    world.members = {
        node: Watching(index=site.index, vector=site.vector, ring=site.ring)
        for node, site in world.members.items()
    }
    transcript = world.up_to_open(lost=[node_name(3)])
    keys = AttemptKeys.derive(bytes(range(32)), world.attempt, node_name(1))
    world.members[node_name(3)].abort()
    values = [
        *seen,
        keys,
        transcript,
        *world.reveals.values(),
        hub.reconstruct((s.body for s in world.reveals.values()), world.listed),
    ]
    classes = {type(value).__name__ for value in seen}
    assert classes >= {
        "ReadySent", "Dealt", "DealOkSent", "Masking", "Uploaded", "Committed", "Revealed",
        "AbortSent",
    }  # fmt: skip
    found = set().union(*(secrets_in(value) for value in values))
    assert len(found) > 50
    for value in values:
        text = repr(value) + str(value)
        for secret in found:
            assert repr(secret)[2:-1] not in text
            assert secret.hex() not in text


def test_the_repr_check_can_fail():
    """A value that prints its secret would be caught by the comparison above."""
    secret = bytes(range(100, 132))
    assert repr(secret)[2:-1] in repr({"share": secret})


def test_later_states_hold_fewer_secrets():
    """RK and b are gone from the record once the upload is fixed; shares once revealed."""
    world = World.make(4, d=8)
    site = world.members[node_name(1)]
    world.up_to_go()
    state = site.state
    secrets = {state.rk_secret, state.self_seed, state.noise_seed}
    keys = AttemptKeys.derive(_seed(world), world.attempt, site.node)
    assert secrets == {keys.rk_secret, keys.self_seed, keys.noise_seed}
    assert len(secrets) == 3
    assert keys.ek_secret.hex().encode() not in site.record
    assert _seed(world).hex().encode() not in site.record
    world.do_upload()
    assert not any(secret.hex().encode() in site.record for secret in secrets)
    held = [share.rk_share for share in site.state.held]
    world.do_survivors()
    world.do_commit()
    world.do_reveal()
    assert not any(share.hex().encode() in site.record for share in held)


def _seed(world: World) -> bytes:
    from tests.support.secagg import seed_of

    return seed_of("attempt", 1, str(world.attempt))


def test_states_read_back_and_nothing_else_does(played):
    record = played.members[node_name(1)].record
    assert state_from_bytes(record).to_bytes() == record
    for cls in states._BY_SCHEMA.values():
        assert cls.SCHEMA.startswith("minga.secagg.state.")
    with pytest.raises(MalformedMessageError):
        state_from_bytes(canonical_bytes({"schema": "minga.secagg.start/1", "readys": []}))
    broken = json.loads(record)
    broken["attempt"]["terms"] = [4, 2, 2, 2]  # terms that withstand nobody
    with pytest.raises(MalformedMessageError):
        state_from_bytes(canonical_bytes(broken))
