"""What the admins had signed, rebuilt from the log's leaves alone: policy, plans and membership.

The repository is a real one (``tests.support.trust``); its files are leaves of the run and
documents beside its log.
"""

from __future__ import annotations

import functools
import json
from datetime import timedelta

import pytest

from infra.admin.proposals import (
    propose_members,
    propose_override,
    propose_plan,
    propose_policy,
)
from policies.audit.records import Result
from policies.audit.verify import Audit, audit
from policies.effect import POLICY_DOCUMENT
from policies.overrides import Override
from protocols.canonical import sha256_hex
from protocols.governance.documents import time_text
from protocols.governance.repository import parse_metadata
from protocols.tlog import kinds
from protocols.tlog.trust_policy import TrustPolicy
from tests.support.audit_disk import minga
from tests.support.audit_run import FEDERATION, NODES, Run
from tests.support.tampering import rewritten
from tests.support.trust import World, institution, policy_bytes

COUNTRIES = dict(zip(NODES, ("AR", "BR", "CL", "PE"), strict=True))


class Governed:
    """A run whose log holds what the admins signed."""

    def __init__(self) -> None:
        self.world = World(institutions=tuple(COUNTRIES.items()))
        members = self.world.members().model_copy(update={"federation": FEDERATION})
        self.world.found(
            federation=FEDERATION,
            members=members,
            policy={POLICY_DOCUMENT: self.policy(policy_version=1)},
        )
        self.run = Run()
        self.run.clock = self.world.now
        self.root = self.world.files["metadata/1.root.json"]
        self.run.begin()
        self.known: set[str] = set()
        self.publish()

    def policy(self, **changes):
        return policy_bytes(
            admins=3, threshold=2, min_countries=2, federation=FEDERATION, **changes
        )

    def publish(self) -> None:
        """A leaf for every new metadata file, the timestamp last; all files are documents."""
        files = self.world.files
        for data in files.values():
            self.run.documents[sha256_hex(data)] = data
        new = sorted(n for n in files.keys() - self.known if n.startswith("metadata/"))
        self.known |= files.keys()
        ordered = [n for n in new if n.count(".") == 2 and "timestamp" not in n]
        for name in [*ordered, "metadata/timestamp.json"]:
            data = files[name]
            role = name.removeprefix("metadata/").removesuffix(".json").rpartition(".")[2]
            from tuf.api.metadata import Root, Snapshot, Targets, Timestamp

            kind = {"root": Root, "snapshot": Snapshot, "timestamp": Timestamp}.get(role, Targets)
            said = kinds.TufPublished(
                role=role,
                version=parse_metadata(data, kind).signed.version,
                sha256=sha256_hex(data),
                length=len(data),
            )
            self.run.say("coordinator", said)
        self.run.checkpoint()

    def enact(self, request) -> None:
        self.world.enact(request, ["ana", "bruno", "carla"])
        self.publish()

    def sign_plan(self) -> None:
        self.enact(propose_plan(self.world.base(), self.run.plan))

    def tuf(self) -> dict[str, kinds.Published]:
        """What a plan leaf names: the versions in force."""
        state = self.world.state
        return {
            role: kinds.Published(version=version, sha256=state.published[role, version])
            for role, version in state.versions.items()
            if role in {"root", "policy", "membership", "plans"}
        }

    def round(self) -> None:
        honest = self.run.say
        named = self.tuf()

        def say(who, said, **about):
            if isinstance(said, kinds.RoundPlan):
                said = said.model_copy(update={"tuf": named})
            return honest(who, said, **about)

        self.run.say = say
        self.run.open_round()
        world = self.run.start_attempt()
        self.run.upload(world, NODES)
        self.run.release(world)
        self.run.say = honest

    def audit(self, root: bytes | None = b"") -> Audit:
        tampered = rewritten(self.run, self.run.entries, "files")
        return audit(
            tampered.files,
            TrustPolicy.parse(self.run.policy()),
            now=int(self.run.clock.timestamp()) + 60,
            anchored=True,
            documents=self.run.documents.get,
            blobs=self.run.blobs.get,
            root=self.root if root == b"" else root,
        )


@functools.cache
def governed() -> Governed:
    made = Governed()
    made.sign_plan()
    made.round()
    return made


def answers(found: Audit, id_: str) -> set[tuple[str, str]]:
    return {(r.result.value, r.reason) for r in found.records if r.id == id_}


def test_policy_plan_and_members_are_verified_from_the_first_root():
    found = governed().audit()

    assert found.first is None
    ((result, reason),) = answers(found, "2")
    assert result == "pass"
    assert reason == "policy 1, root 1, signed by ar-univ-1, br-univ-1, cl-univ-1"
    assert {result for result, _ in answers(found, "3")} == {"pass"}
    assert answers(found, "15") == {("pass", "4 joins, all by active members")}
    assert {result for result, _ in answers(found, "14")} <= {"pass", "fail"}  # a limit is known


def test_without_a_root_nothing_is_known_of_the_policy():
    found = governed().audit(root=None)

    assert found.first is None
    assert {result for result, _ in answers(found, "2")} == {"unknown"}
    assert {result for result, _ in answers(found, "15")} == {"unknown"}


def test_another_root_convicts_the_first_publication():
    other = World(threshold=3)
    other.found()

    found = governed().audit(root=other.files["metadata/1.root.json"])

    assert found.first is not None
    assert found.first.check == "policy"
    kind = found.evidence.taken[found.first.first].said
    assert isinstance(kind, kinds.TufPublished)


def test_an_override_is_known_with_its_signers():
    made = Governed()
    made.sign_plan()
    override = Override.model_validate(
        {
            "schema": "minga.override/1",
            "federation": FEDERATION,
            "plan": made.run.plan.digest,
            "rule": "rounds.hours",
            "code": "night-run",
            "granted_at": time_text(made.world.now),
            "expires": time_text(made.world.now + timedelta(hours=4)),
        }
    )
    made.enact(propose_override(made.world.base(), override))

    ((result, reason),) = answers(made.audit(), "11")
    assert result == "pass"
    assert "rounds.hours is set aside for plan" in reason
    assert "signed by ar-univ-1, br-univ-1, cl-univ-1" in reason
    assert answers(governed().audit(), "11") == {("pass", "none was granted")}


def test_a_plan_that_the_admins_did_not_sign_fails():
    made = Governed()
    made.round()

    ((result, reason),) = answers(made.audit(), "2")
    assert result == "fail"
    assert "no plan of run r1 is signed" in reason


def test_metadata_that_was_not_in_force_fails():
    made = Governed()
    made.sign_plan()
    old = made.tuf()
    made.enact(propose_policy(made.world.base(), {POLICY_DOCUMENT: made.policy(policy_version=2)}))
    made.tuf = lambda: old
    made.round()

    ((result, reason),) = answers(made.audit(), "2")
    assert result == "fail"
    assert "policy 1" in reason


def test_a_suspended_member_that_joined_is_found():
    made = Governed()
    made.sign_plan()
    members = made.world.state.members
    changed = tuple(
        institution(item.id, item.country, status="suspended", since=item.since)
        if item.id == NODES[3]
        else item
        for item in members.institutions
    )
    made.enact(
        propose_members(
            made.world.base(), members.model_copy(update={"institutions": changed}), "suspend"
        )
    )
    made.round()

    (record,) = [r for r in made.audit().failed if r.id == "15"]
    assert record.reason == "inst-04 joined while suspended"
    assert made.audit().result is Result.FAIL


def test_a_file_that_was_exchanged_is_found():
    made = Governed()
    said = next(t for t in made.audit().evidence.taken if getattr(t.said, "role", None) == "policy")
    made.run.documents[said.said.sha256] = b"{}"

    first = made.audit().first

    assert first is not None
    assert first.check == "policy"


def test_files_that_are_not_at_hand_are_unknown_not_good():
    made = Governed()
    made.sign_plan()
    made.round()
    said = next(t for t in made.audit().evidence.taken if getattr(t.said, "role", None) == "policy")
    del made.run.documents[said.said.sha256]

    found = made.audit()

    assert found.first is None
    assert {result for result, _ in answers(found, "2")} == {"unknown"}


def test_a_mirror_brings_all_that_the_admins_signed(tmp_path):
    """Also what is not in force any more: leaves name every version."""
    from coordinator.static_http import StaticServer

    made = governed()
    documents, made.run.documents = made.run.documents, {}
    made.run.write(tmp_path)
    made.run.documents = documents
    made.world.write(tmp_path / "signed")
    (tmp_path / "root.json").write_bytes(made.root)
    server = StaticServer("127.0.0.1:0", {"log": tmp_path / "log", "tuf": tmp_path / "signed"})
    server.start()
    try:
        url, mine = f"http://127.0.0.1:{server.port}", tmp_path / "mine"
        policy = ("--trust-policy", tmp_path / "log/trust-policy.txt")
        done = minga("audit", "mirror", f"{url}/log", mine, *policy, "--tuf", f"{url}/tuf")
        assert done.status == 0, done.error
    finally:
        server.stop()

    checked = minga("audit", "verify", mine, *policy, "--root", tmp_path / "root.json", "--json")
    found = {r["id"]: r["result"] for r in json.loads(checked.out)["records"]}
    assert checked.status == 0, checked.error
    assert found["2"] == found["3"] == found["15"] == "pass"


@pytest.mark.parametrize("kept", [("ana",), ()])
def test_a_publication_that_too_few_signed_convicts_its_leaf(kept):
    made = Governed()
    request = propose_policy(made.world.base(), {POLICY_DOCUMENT: made.policy(policy_version=2)})
    made.world.files = made.world.publish(made.world.signed(request, kept))
    made.publish()

    first = made.audit().first

    assert first is not None
    assert first.check == "policy"
    assert "[" in first.reason
