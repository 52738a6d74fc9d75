"""A founded federation's door, fed with what no honest caller sends, and with wrong publications.

The real coordinator with governance and a round log over mutual TLS. What ``test_door_fuzz`` asks
of every answer is asked here of the methods that go by signed documents; and ``Trust.Publish`` gets
publications that were nearly right: too few signatures, a file less, two files exchanged, a value
in signed metadata replaced, and those of ``tests.support.wrongly_signed``. Whatever comes, nothing
may be in force that the admins have not signed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from random import Random
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import event, given, note
from hypothesis import strategies as st

from infra.admin.proposals import (
    propose_documents,
    propose_emergency,
    propose_founding,
    propose_members,
    propose_plan,
    propose_policy,
    propose_rotation,
    with_status,
)
from policies.trust import POLICY_DOCUMENT
from protocols.gen import (
    admin_pb2,
    enrolment_pb2,
    log_pb2,
    rounds_pb2,
    trust_pb2,
)
from protocols.governance import roles
from protocols.governance.documents import Denials
from protocols.tlog.kinds import RoundJoin
from tests.property.test_door_fuzz import FUZZ, LIMITS, Errors, check_answer, knock, person_request
from tests.property.test_trust_parsers import put, spots
from tests.support.door import Door, enrol_request
from tests.support.fuzzing import BYTES, NUMBERS, WORDS, methods, raw
from tests.support.leaves import World as Leaves
from tests.support.trust import World, card, read_files
from tests.support.wrongly_signed import ATTACKS

Files = dict[str, bytes]
METHODS = dict(methods())
# Those whose answer depends on what is signed; the others are the door's of test_door_fuzz.
GOVERNED = sorted(
    name
    for name in METHODS
    if name.startswith(("Trust/", "Enrolment/", "Renewal/", "Admin/", "Log/Submit", "Log/Prove"))
    or name in ("Rounds/Sync", "Rounds/GetPlan", "Rounds/Join")
)
PEOPLE = ["ana", "bruno", "carla"]
DORA = card("dora", "uy-univ-1", "UY")
COMPLETE = ("policy", "members", "emergency")
VALUES: list[Any] = [
    None,
    True,
    -1,
    1.5,
    [],
    {},
    *NUMBERS,
    *(word for word in WORDS if len(word) < 99),
]
STOP = Denials(institutions=(), runs=(), plans=(), code=(), certificates=(), all_rounds=True)


class Founded:
    """A founded federation that is served, with callers and publications to start from."""

    def __init__(self, door: Door) -> None:
        self.door, self.world = door, World()
        self.names = {"operator": door.operator()}
        self.world.found_at(door)
        self.names |= {"member": door.enrol("site-a"), "stranger": door.enrol("z")}
        self.meant: set[str] = set()
        self.begin_anew()
        self.served = {name for name in door.parts.trust._files if name.startswith("metadata/")}
        self.seeds = self._seeds()
        self.pool: list[Any] = [*PEOPLE, "site-a", "site-b", "ar-univ-1", *self.served]
        self.pool += list(self.world.files.values())
        self.enrolment = grpc.secure_channel(
            door.enrolment, grpc.ssl_channel_credentials(door.root)
        )

    def begin_anew(self) -> None:
        """Make publications over what is in force now."""
        world, trust = self.world, self.door.parts.trust
        world.files = read_files(self.door.config.trust)
        world.state = world.verify(dict(trust._files), previous=world.state)
        requests = self._requests()
        everything = {name: world.signed(requests[name], PEOPLE) for name in COMPLETE}
        few = {f"{name} by one": world.signed(requests[name], ["ana"]) for name in requests}
        attacks = {name: attack(world) for name, (_, attack) in ATTACKS.items()}
        self.complete: dict[str, Files] = everything  # sent with something changed
        self.wrong: dict[str, Files] = few | attacks
        for files in (trust._files, *everything.values()):
            self.meant |= {signed_part(name, data) for name, data in files.items()}
        for files in attacks.values():  # parts of them are what two admins want
            self.meant |= {
                signed_part(name, data) for name, data in files.items() if enough(name, data)
            }

    def _requests(self) -> dict[str, Any]:
        world, base = self.world, self.world.base()
        newer = json.loads(base.state.documents[POLICY_DOCUMENT])["policy_version"] + 1
        known = base.state.members.get("site-b")
        other = "suspended" if known is not None and known.status == "active" else "active"
        members = with_status(base.state.members, "site-b", other)
        return {
            "policy": propose_policy(base, {POLICY_DOCUMENT: world.policy(policy_version=newer)}),
            "members": propose_members(base, members, f"site-b is {other}"),
            "emergency": propose_emergency(base, "stop", deny=STOP, code="leak"),
            "rotation": propose_rotation(base, add=[DORA], remove=["carla"]),
            "release": propose_documents(base, roles.RELEASE, "r", put={"release/m.json": b"{}"}),
            "again": propose_founding(world.founding(), now=world.now),
        }

    def _seeds(self) -> dict[str, list[Message]]:
        door = self.door
        run, snapshot = door.make_run("g1", submit=False), door.snapshots["g1"].to_bytes()
        round_ = rounds_pb2.RoundRef(run="g1", number=0)
        leaf = Leaves().say("site-a", _join(run.digest), subject="round/g1/0")
        request = enrol_request("site-c", bytes(range(32)), door.signing_key("site-c"), leaf=leaf)
        return {
            "Admin/Invite": [admin_pb2.InviteRequest(institution="site-c", valid_hours=1)],
            "Admin/PlanRun": [admin_pb2.PlanRunRequest(plan=run.to_bytes(), coordinates=1000)],
            "Admin/ShowRun": [admin_pb2.ShowRunRequest(run="g1")],
            "Admin/StopRun": [admin_pb2.StopRunRequest(run="g1", reason="for the test")],
            "Admin/SubmitRun": [admin_pb2.SubmitRunRequest(plan=run.to_bytes(), snapshot=snapshot)],
            "Admin/WatchRun": [admin_pb2.WatchRunRequest(run="g1")],
            "Admin/Why": [admin_pb2.WhyRequest(round=round_)],
            "Enrolment/Join": [request],
            "Enrolment/JoinPerson": [
                enrolment_pb2.PersonEnrolRequest(
                    request=person_request(request.csr_der), csr_der=request.csr_der
                )
            ],
            "Log/Prove": [log_pb2.ProveRequest(leaf_hash=bytes(32))],
            "Log/Submit": [log_pb2.SubmitRequest(entries=[leaf])],
            "Renewal/Renew": [enrolment_pb2.RenewRequest(csr_der=request.csr_der, leaf=leaf)],
            "Rounds/GetPlan": [rounds_pb2.GetPlanRequest(run="g1")],
            "Rounds/Join": [
                rounds_pb2.JoinRequest(round=round_, plan_digest=run.digest, leaf=leaf)
            ],
            "Rounds/Sync": [rounds_pb2.SyncRequest(wait_ms=1, state="running")],
            "Trust/Approvals": [trust_pb2.ApprovalsRequest(nodes=["site-a"])],
            "Trust/File": [trust_pb2.TrustFileRequest(name=name) for name in sorted(self.served)],
            "Trust/Publish": [
                trust_pb2.PublishTrustRequest(files=files) for files in self.wrong.values()
            ],
        }

    def channel(self, name: str, method: str) -> grpc.Channel:
        """Where a caller sends a method."""
        return self.enrolment if method.startswith("Enrolment/") else self.names[name].channel

    def check_in_force(self) -> None:
        """Nothing is served but what admins signed and what this coordinator made of it."""
        for name, data in self.door.parts.trust._files.items():
            role = name.removeprefix("metadata/").removesuffix(".json").rpartition(".")[2]
            if role in roles.ONLINE or not name.endswith(".json"):
                continue  # made by the coordinator itself
            assert signed_part(name, data) in self.meant, f"nobody signed {name}"


def _join(plan: str) -> Any:
    return RoundJoin(node="site-a", plan_sha256=plan, model_in="0" * 64)


def signed_part(name: str, data: bytes) -> str:
    """What the signatures of metadata are over, whatever its spelling; a document as it is."""
    if not name.startswith("metadata/"):
        return data.hex()
    return json.dumps(json.loads(data)["signed"], sort_keys=True)


ADMINS = {card(*admin).public.keyid for admin in World().admins}


def enough(name: str, data: bytes) -> bool:
    """Whether two admins signed; what they did not sign counts if they signed its digest."""
    if not name.startswith("metadata/") or ".inst-" in name:
        return True
    return len({each["keyid"] for each in json.loads(data)["signatures"]} & ADMINS) >= 2


@pytest.fixture(scope="module")
def founded(tmp_path_factory: Any) -> Iterator[Founded]:
    door = Door(tmp_path_factory.mktemp("governed"), governed=True, log=True)
    door.config = replace(door.config, limits=LIMITS)
    door.start()
    try:
        yield Founded(door)
    finally:
        door.stop()


@pytest.fixture(scope="module")
def errors() -> Iterator[Errors]:
    found = Errors()
    logging.getLogger().addHandler(found)
    yield found
    logging.getLogger().removeHandler(found)


def test_every_governed_method_has_a_row(founded):
    missing = {name for name in GOVERNED if not name.startswith("Admin/List")} - set(founded.seeds)
    assert not missing


@pytest.mark.parametrize("name", GOVERNED)
@FUZZ
@given(data=st.data())
def test_a_method_answers_or_refuses(founded, errors, name, data):
    caller = data.draw(st.sampled_from(sorted(founded.names)))
    kind = METHODS[name].input_type
    seeds = founded.seeds.get(name) or [GetMessageClass(kind)()]
    one = raw(kind, seeds, founded.pool)
    sent = data.draw(one.map(lambda message: [message]) | st.lists(one, max_size=3))
    knock(founded.channel(caller, name), name, sent)
    errors.none()


def publication(rng: Random, wrong: Mapping[str, Files], complete: Mapping[str, Files]) -> Files:
    """Files that admins nearly signed."""
    known = {**wrong, **complete}
    # Half of them from what is complete but for the change.
    files = dict(known[rng.choice(sorted(complete if rng.random() < 0.5 else known))])
    other = known[rng.choice(sorted(known))]
    for _ in range(rng.randint(1, 3)):
        if not files:
            break
        name = rng.choice(sorted(files))
        match rng.choice(["drop", "rename", "swap", "value", "value", "byte", "mix", "unsign"]):
            case "drop":
                del files[name]
            case "rename":
                files[rng.choice(names_like(name))] = files.pop(name)
            case "swap":
                second = rng.choice(sorted(files))
                files[name], files[second] = files[second], files[name]
            case "value":
                files[name] = with_another_value(rng, files[name])
            case "byte":
                at = rng.randrange(len(files[name]) + 1)
                files[name] = files[name][:at] + rng.randbytes(1) + files[name][at + 1 :]
            case "mix":
                taken = rng.choice(sorted(other))
                files[taken] = other[taken]
            case _:
                files[name] = unsigned(files[name], rng.randint(0, 3))
    return files


def names_like(name: str) -> list[str]:
    """Other versions, names that lead out of the folder, any words."""
    version, _, rest = name.rpartition("/")[2].partition(".")
    other = [f"metadata/{number}.{rest}" for number in (0, 1, 2, 3, 9, 10**18, "01", "-1", "1e3")]
    out = [f"metadata/../{name}", f"/{name}", name.upper(), name + "\x00", version]
    return [*other, *out, *WORDS]


def with_another_value(rng: Random, data: bytes) -> bytes:
    """A JSON document with one value replaced; other bytes: something else altogether."""
    try:
        value = json.loads(data)
        put(value, rng.choice(spots(value)), rng.choice(VALUES))
    except (ValueError, IndexError):
        return rng.choice(BYTES)
    return json.dumps(value).encode()


def unsigned(data: bytes, place: int) -> bytes:
    """Metadata that lacks a signature, or has one twice."""
    try:
        value = json.loads(data)
        signatures = value["signatures"]
        if place < len(signatures):
            del signatures[place]
        else:
            signatures.append(signatures[0])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return data  # a change before this one left no signatures
    return json.dumps(value).encode()


@FUZZ
@given(seed=st.integers(0, 2**64 - 1))
def test_nothing_comes_into_force_that_was_not_signed(founded, errors, seed):
    """The publications are made over what is in force, which those before may have changed."""
    files = publication(Random(seed), founded.wrong, founded.complete)
    note(f"published: {files}")
    message = trust_pb2.PublishTrustRequest(files=files)
    try:
        founded.names["operator"].trust.Publish(message, timeout=60)
        event("in force")
        founded.check_in_force()
        founded.begin_anew()
    except grpc.RpcError as error:
        check_answer(error, "Trust/Publish")
        said = dict(error.trailing_metadata() or ())
        event(said.get("minga-rule") or said["minga-code"])
    errors.none()
    founded.check_in_force()


# -- what was found ------------------------------------------------------------------------------


def refused(founded: Founded, files: Files) -> str:
    """The rule by which a publication is refused."""
    message = trust_pb2.PublishTrustRequest(files=files)
    with pytest.raises(grpc.RpcError) as caught:
        founded.names["operator"].trust.Publish(message, timeout=60)
    return str(dict(caught.value.trailing_metadata() or ())["minga-rule"])


def test_a_file_that_nothing_signed_names_is_not_kept(founded):
    """It was written, served, and never removed; whoever carries could fill the disk with them."""
    stray = {f"targets/release/{'0' * 64}.m.json": b"{}"}
    assert refused(founded, stray) == "trust.shape"
    assert refused(founded, founded.complete["policy"] | stray) == "trust.shape"
    assert not stray.keys() & founded.door.parts.trust._files.keys()


def test_a_document_is_not_kept_with_other_bytes_than_were_signed(founded):
    """Plans are not read when they are published: the false one took the true one's name."""
    plan = founded.door.make_run("signed", submit=False)
    files = founded.world.signed(propose_plan(founded.world.base(), plan), PEOPLE)
    (document,) = (name for name in files if name.startswith("targets/"))
    assert refused(founded, files | {document: b"{}"}) == "trust.shape"
    message = trust_pb2.PublishTrustRequest(files=files)
    assert founded.names["operator"].trust.Publish(message, timeout=60).changes
    founded.begin_anew()


def test_the_oracle_convicts(founded):
    """What nobody signed is seen; another spelling of what was signed is not."""
    trust = founded.door.parts.trust
    name = next(name for name in sorted(trust._files) if name.endswith(".targets.json"))
    kept = trust._files[name]
    try:
        trust._files[name] = json.dumps(json.loads(kept), indent=3).encode()
        founded.check_in_force()
        value = json.loads(kept)
        value["signed"]["version"] += 1
        trust._files[name] = json.dumps(value).encode()
        with pytest.raises(AssertionError, match="nobody signed"):
            founded.check_in_force()
    finally:
        trust._files[name] = kept


def test_a_governed_federation_still_works_afterwards(founded, errors):
    """What is in force verifies as a node would verify it, and members are served."""
    world, door = founded.world, founded.door
    state = world.verify(dict(door.parts.trust._files))
    assert state.federation == "demo"
    assert founded.names["member"].rounds.Sync(rounds_pb2.SyncRequest(wait_ms=1), timeout=20)
    errors.none()
