"""Every parser of a document from outside: whatever comes, it is read or refused with one of ours.

The parsers are not listed by hand: they are found in the source. Whoever adds one to ``protocols``
or ``policies`` adds a row here, or says why nothing from outside reaches it, or this file fails.
"""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from tuf.api.metadata import Root

import policies
import protocols
import protocols.governance
from policies import document as policy_document
from policies.cedar import consortium_text, schema_text
from policies.cedar.engine import read_rules
from policies.consortium import ConsortiumPolicy
from policies.effect import read_times
from policies.governance import parse_charter
from policies.overrides import Override
from policies.privacy.claim import Claim
from policies.site import SitePolicy
from protocols import canonical, identifiers
from protocols.crypto.identity import parse_spiffe_uri, read_csr
from protocols.crypto.signatures import parse_public_key
from protocols.decimals import read_decimal
from protocols.enrolment import Invitation
from protocols.errors import FederationError
from protocols.governance.documents import Document, parse_time
from protocols.governance.keys import parse_country, parse_holder, parse_key
from protocols.governance.repository import parse_metadata
from protocols.governance.requests import SigningRequest, open_request
from protocols.identifiers import FederationId
from protocols.plan import Plan
from protocols.secagg import messages
from protocols.secagg.keys import parse_x25519
from protocols.secagg.shamir import parse_share
from protocols.tensors.manifest import Manifest, TensorSpec
from protocols.tensors.ring import Ring
from protocols.tensors.scales import Scales, initial_scales
from protocols.tensors.snapshot import Snapshot
from protocols.tlog.cosignature import open_checkpoint
from protocols.tlog.kinds import parse_round_subject, read_predicate
from protocols.tlog.kinds_round import RunRequest
from protocols.tlog.note import KeyRing
from protocols.tlog.tiles import parse_tile
from protocols.tlog.witness import parse_answer
from protocols.upload import UploadHeader
from tests.property import test_tlog_parsers as of_the_log
from tests.property.test_trust_parsers import REQUEST, WORLD, mutated
from tests.support.governed import SITE, governed_plan
from tests.support.policies import example
from tests.support.tlog import LOG, signed
from tests.support.trust import NOW

ROOT = Path(protocols.__path__[0]).parent
DEMO = FederationId("demo")
Parse = Callable[[bytes], object]

# What nothing from outside reaches, and why.
INSIDE = {
    "protocols/canonical.py:parse_canonical": "every document below goes through it",
    "protocols/governance/documents.py:_Part.from_value": "the classes below are its subclasses",
    "protocols/governance/documents.py:Document.from_bytes": "likewise, each by itself",
    "protocols/secagg/messages.py:_Message.from_bytes": "likewise",
    "protocols/secagg/codec.py:from_bytes": "what each message's from_bytes is made of",
    "protocols/secagg/codec.py:from_json": "likewise",
    "protocols/governance/repository.py:_Reader.read": "test_trust_parsers changes each file",
    "policies/document.py:parse_utc": "the check of a field; its ValueError is the model's",
    "policies/document.py:parse_share": "likewise",
    "policies/document.py:read_section": "takes what from_value took",
    "protocols/wire.py:read_digest": "a field of a protobuf message: the door's tests",
    "protocols/wire.py:read_digest_bytes": "likewise",
    "protocols/wire.py:read_bytes": "likewise",
    "protocols/wire.py:read_text": "likewise",
}
NAMES = ("parse", "read", "open_", "from_bytes", "from_value", "from_text", "from_json")
TYPES = ("bytes", "str", "object", "Any")


def _first_type(function: ast.FunctionDef) -> str | None:
    arguments = [*function.args.posonlyargs, *function.args.args]
    named = [item for item in arguments if item.arg not in ("self", "cls")]
    return ast.unparse(named[0].annotation) if named and named[0].annotation else None


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner


def parsers_of(source: str) -> set[str]:
    """Names of functions and methods that take text or bytes, or parsed JSON, from somewhere."""
    return {
        name
        for name, function in _functions(ast.parse(source))
        if name.rpartition(".")[2].startswith(NAMES) and _first_type(function) in TYPES
    }


def found() -> set[str]:
    """All parsers in the source, and every document that inherits one."""
    names = set()
    for package in ("protocols", "policies"):
        for path in sorted((ROOT / package).rglob("*.py")):
            place = path.relative_to(ROOT).as_posix()
            if any(part in place for part in ("/gen/", "/proto/", "/vectors/")):
                continue
            names |= {f"{place}:{name}" for name in parsers_of(path.read_text("utf-8"))}
    for package in (protocols.governance, policies):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    return names | {f"document {kind.__name__}" for kind in documents()}


def documents() -> dict[type, None]:
    """Everything that inherits ``from_bytes``, in order; not what tests add."""
    kinds: dict[type, None] = {}
    waiting = [Document, messages._Message]
    while waiting:
        kind = waiting.pop()
        below = [item for item in kind.__subclasses__() if item.__module__.startswith(OURS)]
        waiting += below
        abstract = (messages.Body,)
        kinds.update(
            (item, None)
            for item in below
            if not item.__name__.startswith("_") and item not in abstract
        )
    return kinds


OURS = ("protocols.", "policies.", "infra.", "node_agent.", "coordinator.")


def text(parse: Callable[[str], object]) -> Parse:
    """A parser of text, fed with any bytes."""
    return lambda data: parse(data.decode("latin-1"))


def value(parse: Callable[[Any], object]) -> Parse:
    """A parser of parsed JSON."""

    def read(data: bytes) -> object:
        return parse(canonical.parse_json(data))

    return read


def _csr() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def _json(item: Any) -> bytes:
    return json.dumps(item).encode()


def _predicate(data: bytes) -> object:
    item = canonical.parse_json(data)
    return read_predicate("log.heartbeat", item) if isinstance(item, dict) else None


MANIFEST = Manifest((TensorSpec("vector", (100,)),))
PLAN = governed_plan()
SCALES = initial_scales(MANIFEST, PLAN.vector.scale, Ring(20), 3)
HEADER = UploadHeader(
    federation=DEMO, run=PLAN.run_id, round=0, attempt=1, node=PLAN.roster_ids[0],
    plan=PLAN.digest, model=PLAN.digest, coordinates=100, ring=20, size=250, root=PLAN.digest,
)  # fmt: skip
RUN = RunRequest(
    federation="demo", run="r1", plan_sha256="0" * 64, model_root="1" * 64,
    time="2026-12-01T00:00:00Z",
)  # fmt: skip
BEAT = {"interval_s": 3600}
SEEDS: dict[str, tuple[bytes, Parse]] = {
    "protocols/canonical.py:parse_json": (PLAN.to_bytes(), canonical.parse_json),
    "protocols/crypto/identity.py:parse_spiffe_uri": (
        b"spiffe://demo.minga.example/inst/site-a/node/1",
        text(lambda item: parse_spiffe_uri(item, DEMO)),
    ),
    "protocols/crypto/identity.py:read_csr": (_csr(), read_csr),
    "protocols/crypto/signatures.py:parse_public_key": (bytes(31) + b"\x01", parse_public_key),
    "protocols/enrolment.py:Invitation.parse": (
        Invitation(institution="a", secret=bytes(32), root_der=b"x", trust_root=b"")  # type: ignore[arg-type]
        .to_text().encode(),
        text(Invitation.parse),
    ),
    "protocols/governance/documents.py:parse_time": (b"2026-12-01T00:00:00Z", text(parse_time)),
    "protocols/governance/keys.py:parse_country": (b"CL", text(parse_country)),
    "protocols/governance/keys.py:parse_holder": (
        _json({"person": "ana", "institution": "ar-1", "country": "AR"}), value(parse_holder),
    ),
    "protocols/governance/keys.py:parse_key": (
        _json(WORLD.cards[0].key), value(parse_key),
    ),
    "protocols/governance/repository.py:parse_metadata": (
        WORLD.files["metadata/1.root.json"],
        lambda data: parse_metadata(data, Root),
    ),
    "protocols/governance/requests.py:SigningRequest.read": (
        REQUEST.to_bytes(),
        lambda data: open_request(SigningRequest.read(data), trusted_root=None, now=NOW),
    ),
    "protocols/decimals.py:read_decimal": (
        b"4194304", text(partial(read_decimal, most=2**42)),
    ),
    "protocols/identifiers.py:parse_federation_id": (
        b"demo", text(identifiers.parse_federation_id),
    ),
    "protocols/identifiers.py:parse_node_id": (b"site-a", text(identifiers.parse_node_id)),
    "protocols/identifiers.py:parse_run_id": (b"run-1", text(identifiers.parse_run_id)),
    "protocols/identifiers.py:parse_digest": (b"0" * 64, text(identifiers.parse_digest)),
    "protocols/identifiers.py:RoundId.parse": (b"run-1/3", text(identifiers.RoundId.parse)),
    "protocols/plan.py:Plan.from_bytes": (PLAN.to_bytes(), Plan.from_bytes),
    "protocols/plan.py:Plan.from_value": (PLAN.to_bytes(), value(Plan.from_value)),
    "protocols/secagg/keys.py:parse_x25519": (bytes(range(32)), parse_x25519),
    "protocols/secagg/shamir.py:parse_share": (bytes(range(33)), parse_share),
    "protocols/tensors/manifest.py:Manifest.from_bytes": (
        MANIFEST.to_bytes(), Manifest.from_bytes,
    ),
    "protocols/tensors/scales.py:Scales.from_bytes": (
        SCALES.to_bytes(), lambda data: Scales.from_bytes(data, MANIFEST),
    ),
    "protocols/tensors/snapshot.py:Snapshot.from_bytes": (
        Snapshot.initial(MANIFEST, PLAN.digest, SCALES).to_bytes(), Snapshot.from_bytes,
    ),
    "protocols/tlog/cosignature.py:open_checkpoint": (
        signed(5, "w1").to_bytes(),
        lambda data: open_checkpoint(data, KeyRing.of([LOG.verifier]), now=2_000_000_000),
    ),
    "protocols/tlog/kinds.py:read_predicate": (_json(BEAT), _predicate),
    "protocols/tlog/kinds.py:parse_round_subject": (
        b"fed/demo/run-1/round/3", text(parse_round_subject),
    ),
    "protocols/tlog/kinds_round.py:RunRequest.from_bytes": (RUN.to_bytes(), RunRequest.from_bytes),
    "protocols/tlog/tiles.py:parse_tile": (bytes(64), lambda data: parse_tile(data, 2)),
    "protocols/tlog/witness.py:parse_answer": (
        signed(5, "w1").to_bytes().rpartition(b"\n\n")[2],
        lambda data: parse_answer(
            data, text=signed(5).text, ring=KeyRing.of([LOG.verifier]), now=2_000_000_000
        ),
    ),
    "protocols/upload.py:UploadHeader.from_bytes": (HEADER.to_bytes(), UploadHeader.from_bytes),
    "policies/effect.py:read_times": (b"7 2026-12-01T00:00:00Z\n", read_times),
    "policies/cedar/engine.py:read_rules": (
        consortium_text().encode(),
        text(lambda item: read_rules(item, prefix="fed.", schema=schema_text(), what="f")),
    ),
    "policies/consortium.py:ConsortiumPolicy.from_bytes": (
        example().to_bytes(), ConsortiumPolicy.from_bytes,
    ),
    "policies/consortium.py:ConsortiumPolicy.from_value": (
        example().to_bytes(), value(ConsortiumPolicy.from_value),
    ),
    "policies/document.py:read_document": (
        example().to_bytes(),
        lambda data: policy_document.read_document(ConsortiumPolicy, data, "policy"),
    ),
    "policies/governance.py:parse_charter": (
        (ROOT / "GOVERNANCE.md").read_bytes(), text(parse_charter),
    ),
    "policies/overrides.py:Override.from_bytes": (b"{}", Override.from_bytes),
    "policies/privacy/claim.py:Claim.from_value": (b"{}", value(Claim.from_value)),
    "policies/site.py:SitePolicy.from_value": (_json(SITE), value(SitePolicy.from_value)),
}  # fmt: skip
LOG_NAMES = {
    "note": "protocols/tlog/note.py:Note.parse",
    "checkpoint": "protocols/tlog/checkpoint.py:Checkpoint.parse",
    "vkey": "protocols/tlog/note.py:VerifierKey.parse",
    "skey": "protocols/tlog/note.py:SignerKey.parse_private",
    "tile": "protocols/tlog/tiles.py:Tile.parse",
    "bundle": "protocols/tlog/tiles.py:parse_bundle",
    "proof": "protocols/tlog/proof_file.py:ProofFile.parse",
    "policy": "protocols/tlog/trust_policy.py:TrustPolicy.parse",
    "statement": "protocols/tlog/leaf.py:Statement.parse",
    "leaf": "protocols/tlog/leaf.py:open_leaf",
    "request": "protocols/tlog/witness.py:Request.parse",
}
LINE = "protocols/tlog/note.py:SignatureLine.parse"  # of every note
SHARED = {kind.__name__: kind for kind in documents()}


def _secagg_seeds() -> dict[str, bytes]:
    path = ROOT / "protocols" / "vectors" / "secagg-messages.json"
    listed = json.loads(path.read_text())["messages"]
    return {item["kind"]: bytes.fromhex(item["bytes"]) for item in listed}


def rows() -> dict[str, tuple[bytes, Parse]]:
    made = dict(SEEDS)
    for short, name in LOG_NAMES.items():
        made[name] = of_the_log.PARSERS[short]
    made[LINE] = made[LOG_NAMES["note"]]
    secagg = _secagg_seeds()
    seeds = {
        "Members": WORLD.members().to_bytes(),
        "Admins": WORLD.state.admins.to_bytes() if WORLD.state else b"{}",
        "SigningRequest": REQUEST.to_bytes(),
    } | secagg
    for name, kind in SHARED.items():
        parse = kind.from_bytes
        if issubclass(kind, messages.Body):  # comes in an envelope with its signature
            parse = partial(messages.signed_from_bytes, kind)
        made[f"document {name}"] = (seeds.get(name, b"{}"), parse)
    return made


ROWS = rows()


def test_every_parser_has_a_row_or_a_reason():
    missing = found() - ROWS.keys() - INSIDE.keys()
    assert not missing, f"give each a row in SEEDS, or a reason in INSIDE: {sorted(missing)}"
    gone = (ROWS.keys() | INSIDE.keys()) - found()
    assert not gone, f"no such parser any more: {sorted(gone)}"


def test_a_parser_that_somebody_adds_is_found():
    source = "class X:\n    def from_bytes(cls, data: bytes): ...\ndef parse_y(t: str): ...\n"
    assert parsers_of(source) == {"X.from_bytes", "parse_y"}
    assert parsers_of("def read_many(count: int): ...\ndef other(t: str): ...\n") == set()


@st.composite
def damaged(draw: Any, seed: bytes) -> bytes:
    """Real bytes with a few changes, one JSON value replaced, or nothing of it left."""
    how = draw(st.integers(0, 9))
    if how == 0:
        return draw(st.binary(max_size=80))
    if how <= 4 and seed[:1] == b"{" and seed != b"{}":
        return draw(mutated(seed.decode()))
    data = seed
    for place, cut, new in draw(of_the_log.edits):
        at = place % (len(data) + 1)
        data = data[:at] + new + data[at + cut :]
    return data


@pytest.mark.parametrize("name", sorted(ROWS))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_it_is_read_or_refused(name, data):
    seed, parse = ROWS[name]
    with suppress(FederationError):  # and of nobody else
        parse(data.draw(damaged(seed)))


# Their keys are nobody's here.
UNREAD = {"protocols/tlog/leaf.py:open_leaf", "protocols/tlog/witness.py:parse_answer"}


@pytest.mark.parametrize(
    "name", sorted(n for n, (seed, _) in ROWS.items() if seed != b"{}" and n not in UNREAD)
)
def test_the_seed_itself_is_read(name):
    """Else the row would test nothing but the first check of its parser."""
    seed, parse = ROWS[name]
    parse(seed)
