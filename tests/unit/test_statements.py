"""What admins and institutions say by hand in the log: who may, who may not, who finds out."""

from __future__ import annotations

import json
import time

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)

from infra.admin.proposals import propose_members, with_status
from infra.admin.statements import ABOUT, read_statement, sign_statement
from policies.audit.replay import LeafRefusedError, Replay
from policies.audit.speakers import speakers_of
from protocols.crypto.signatures import BadSignatureError
from protocols.errors import MalformedMessageError
from protocols.tlog import kinds
from protocols.tlog.leaf import BrokenChainError, Seen
from protocols.tlog.merkle import EMPTY_ROOT
from tests.support.audit_disk import minga
from tests.support.audit_run import NODES as INSTITUTIONS
from tests.support.door import served
from tests.support.leaves import TIME, D, key, key_hex
from tests.support.leaves import World as Leaves
from tests.support.log_dir import read_log
from tests.support.trust import World, private
from tests.unit.test_audit_signed import Governed, answers

A, UNTIL = D["a"], "2027-01-01T00:00:00Z"
NOTHING = Seen(size=0, root=EMPTY_ROOT)
HOME = "ar-univ-1"
SAID = {
    "audit.report": {"size": 9, "root": A, "result": "pass", "report_sha256": A},
    "ballot": {"proposal_sha256": A, "choice": "no", "code": "too-early"},
    "code.approved": {"source_commit": "0" * 40, "image": A, "expires": UNTIL},
    "dataset.declared": {
        "institution": HOME,
        "dataset": "leyes",
        "declaration_sha256": A,
        "licence": "CC0-1.0",
        "jurisdiction": "AR",
    },
    "emergency.notice": {"document_sha256": A, "code": "leak", "expires": UNTIL},
    "eval.report": {
        "model": A,
        "evaluator": HOME,
        "gates": [{"gate": "gate.quality", "value_micro": -3, "passed": True}],
        "report_sha256": A,
    },
    "incident": {"klass": "outage", "code": "power"},
    "member.statement": {"institution": HOME, "topic": "appeal", "statement_sha256": A},
    "objection.resolved": {"objection": A, "outcome": "dismissed", "code": "no-evidence"},
    "override.granted": {
        "plan_sha256": A,
        "rule": "rounds.hours",
        "code": "night-run",
        "expires": UNTIL,
        "approvals": [],
    },
    "policy.proposed": {
        "role": "policy",
        "version": 2,
        "sha256": A,
        "change": "policy",
        "expires": UNTIL,
    },
    "release.approved": {"model": A, "card_sha256": A, "reports": [A], "approvals": []},
    "release.withdrawn": {"model": A, "code": "memorised"},
}
BY_ADMINS = {
    "ballot", "code.approved", "emergency.notice", "objection.resolved", "override.granted",
    "policy.proposed", "release.approved", "release.withdrawn",
}  # fmt: skip


def published(world, version=1, **speakers):
    said = {"admin": {"ana": (key_hex("ana"),)}, "institution": {HOME: (key_hex("home"),)}}
    world.say(
        "coordinator",
        kinds.TufPublished(
            role="timestamp",
            version=version,
            sha256=D["b"],
            length=9,
            speakers=kinds.Speakers(**said | speakers),
        ),
    )


@pytest.fixture
def world():
    made = Leaves().begin()
    published(made)
    return made


def signed(log, who, kind, **changes):
    said = read_statement(kind, SAID[kind] | changes)
    return sign_statement(said, key(who), log=log, seen=NOTHING, now=TIME)


@pytest.mark.parametrize("kind", sorted(kinds.PEOPLE))
def test_each_kind_is_read_and_taken_from_the_right_key_only(world, kind):
    assert SAID.keys() == kinds.PEOPLE == ABOUT.keys()
    right, wrong = ("ana", "home") if kind in BY_ADMINS else ("home", "ana")
    log = world.replay()
    taken = log.copy().take(signed(log, right, kind).entry)
    assert kind == taken.said.KIND
    assert taken.said.to_fields().items() >= SAID[kind].items()
    assert {taken.holder.role} <= taken.said.SIGNERS
    if kind != "incident":  # everybody may report one
        with pytest.raises(LeafRefusedError, match=r"log\.signer"):
            signed(log, wrong, kind)
    with pytest.raises(MalformedMessageError):
        read_statement(kind, SAID[kind] | {"note": "x"})


def test_refusals(world):
    log = world.replay()
    with pytest.raises(BadSignatureError):
        signed(log, "mallory", "ballot")
    with pytest.raises(LeafRefusedError, match=r"log\.name"):
        signed(log, "home", "member.statement", institution="br-univ-1")
    with pytest.raises(LeafRefusedError, match=r"log\.people"):
        read_statement("round.plan", {})
    signatures = [{"key": A, "signature": "A" * 512}] * 64
    with pytest.raises(MalformedMessageError, match="at most 32768"):
        signed(log, "ana", "release.approved", approvals=signatures)
    first, fork = signed(log, "ana", "ballot"), signed(log, "ana", "ballot", choice="yes")
    log.take(first.entry)
    with pytest.raises(BrokenChainError):
        log.take(fork.entry)
    assert signed(log, "ana", "ballot").statement.prev == first.hash


def test_keys_are_in_force_from_their_leaf_until_another_leaves_them_out(world):
    before = Replay()
    for entry in world.entries[:-1]:
        before.take(entry)
    with pytest.raises(BadSignatureError):
        signed(before, "ana", "ballot")
    published(world, 2, admin={"bruno": (key_hex("bruno"),)}, institution={})
    log = world.replay()
    for gone in ("ana", "home"):
        with pytest.raises(BadSignatureError):
            signed(log, gone, "incident")
    signed(log, "bruno", "ballot")


def test_a_key_that_is_somebody_elses_stays_so(world):
    published(world, 2, admin={"ana": (key_hex("operator"), key_hex(HOME))})
    log = world.replay()
    with pytest.raises(LeafRefusedError, match=r"log\.signer"):
        signed(log, "operator", "ballot")
    with pytest.raises(LeafRefusedError, match=r"log\.signer"):
        signed(log, HOME, "ballot")  # the node's key


@pytest.mark.parametrize(
    "speakers",
    [
        {"admin": {"ana": (A, A)}, "institution": {}},
        {"admin": {"ana": (A,)}, "institution": {HOME: (A,)}},
        {"admin": {"ana": tuple(f"{n:064x}" for n in range(129))}, "institution": {}},
        {"admin": {"ana": ()}, "institution": {}},
    ],
)
def test_speakers_are_each_named_once_and_not_too_many(speakers):
    said = {"role": "timestamp", "version": 1, "sha256": A, "length": 9}
    with pytest.raises(MalformedMessageError):
        kinds.read_predicate("tuf.published", said | {"speakers": speakers})
    good = {"admin": {}, "institution": {}}
    kinds.read_predicate("tuf.published", said | {"speakers": good})
    with pytest.raises(MalformedMessageError):
        kinds.read_predicate("tuf.published", said | {"role": "root", "speakers": good})


def test_a_suspended_member_still_speaks_and_one_that_left_does_not():
    world = World()
    world.found()
    for status, speaks in (("suspended", True), ("left", False)):
        request = propose_members(
            world.base(), with_status(world.state.members, "site-a", status), status
        )
        state = world.enact(request, ["ana", "bruno", "carla"])
        assert ("site-a" in speakers_of(state).institution) is speaks
        assert set(speakers_of(state).admin) == {"ana", "bruno", "carla"}


# -- what an auditor finds -------------------------------------------------------------------------


class Speaking(Governed):
    """Its publications name keys; the lie, if there is one, too."""

    def __init__(self, lie=None):
        self.lie = lie
        super().__init__()

    def publish(self):
        honest, speakers = self.run.say, self.lie or speakers_of(self.world.state)

        def say(who, said, **about):
            if isinstance(said, kinds.TufPublished) and said.role == "timestamp":
                said = said.model_copy(update={"speakers": speakers})
            return honest(who, said, **about)

        self.run.say = say
        super().publish()
        self.run.say = honest


def test_declared_data_answers_question_7():
    made = Speaking()
    made.sign_plan()
    signer = made.run.signer
    made.run.signer = lambda who: private(who) if who.startswith("institution ") else signer(who)
    fields = {"dataset": "leyes", "declaration_sha256": A, "licence": "CC0-1.0"}
    for name in INSTITUTIONS:
        said = {**fields, "institution": name, "jurisdiction": "AR"}
        made.run.say(f"institution {name}", kinds.DatasetDeclared(**said))
    honest = made.run.say

    def say(who, said, **about):
        if isinstance(said, kinds.UpdateCommit):
            used = kinds.DatasetUsed(id="leyes", declaration_sha256=A, licence="CC0-1.0")
            said = said.model_copy(update={"datasets": (used,)})
        return honest(who, said, **about)

    made.run.say = say
    made.round()
    found = made.audit()
    assert found.first is None
    assert {result for result, _ in answers(found, "7")} == {"pass"}


def test_other_keys_than_were_signed_convict_the_publication():
    lie = kinds.Speakers(admin={"ana": (key_hex("mallory"),)}, institution={})
    first = Speaking(lie).audit().first
    assert first is not None
    assert first.check == "policy"
    assert "other keys" in first.reason


# -- the real services -----------------------------------------------------------------------------


def test_signed_offline_brought_by_the_operator_and_verified(tmp_path):
    with served(tmp_path / "fed", governed=True, log=True) as door:
        world = World()
        world.found_at(door)
        log, secret = tmp_path / "fed" / "log", tmp_path / "secret"
        secret.write_text("correct horse battery")

        def key_file(name):
            path = tmp_path / name.replace(" ", "-")
            how = BestAvailableEncryption(secret.read_bytes())
            path.write_bytes(private(name).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how))
            path.chmod(0o600)
            return path

        def sign(kind, name, out, **changes):
            fields = tmp_path / f"{out}.json"
            fields.write_text(json.dumps(SAID[kind] | changes))
            return minga(
                *("admin", "statement", "sign", kind, "--fields", fields, "--log", log),
                *("--key", key_file(name), "--passphrase-file", secret, "--out", tmp_path / out),
            )

        def publish(out):
            fed = ("--dir", tmp_path / "fed")
            return minga("admin", "statement", "publish", tmp_path / out, *fed)

        declared = sign("dataset.declared", "institution site-a", "one", institution="site-a")
        assert declared.status == 0, declared.error
        assert sign("ballot", "ana", "two").status == 0
        assert sign("ballot", "ana", "fork", choice="yes").status == 0
        assert sign("ballot", "institution site-a", "no").status == 5
        assert sign("ballot", "mallory", "no").status == 5
        assert not (tmp_path / "no").exists()

        size = door.ledger(lambda tx: tx.log_size())
        for out in ("one", "two", "two"):
            done = publish(out)
            assert done.status == 0, done.error
        assert door.ledger(lambda tx: tx.log_size()) == size + 2
        broken = publish("fork")
        assert (broken.status, "leaf_chain" in str(broken.error)) == (5, True)
        (tmp_path / "own").write_bytes(read_log(log).entries[0])
        assert "log.people" in str(publish("own").error)
        (tmp_path / "huge").write_bytes(b"{" * 40_000)
        assert publish("huge").status == 3
        assert door.ledger(lambda tx: tx.log_size()) == size + 2

        until = time.monotonic() + 20
        while read_log(log).head.size < size + 2 and time.monotonic() < until:
            time.sleep(0.1)
        said = [entry.said.KIND for entry in map_taken(read_log(log).entries)]
        assert said[-2:] == ["dataset.declared", "ballot"]
        root = tmp_path / "root.json"
        root.write_bytes(world.files["metadata/1.root.json"])
        policy = ("--trust-policy", log / "trust-policy.txt")
        checked = minga("audit", "verify", log, *policy, "--root", root, "--json")
        found = json.loads(checked.out)
        assert (checked.status, found["faults"]) == (0, []), checked.error


def map_taken(entries):
    state = Replay()
    return [state.take(entry) for entry in entries]
