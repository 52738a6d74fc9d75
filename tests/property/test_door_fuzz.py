"""Every method of the coordinator, fed with what no honest node sends: it answers or refuses.

The real server with real mutual TLS. A refusal is a gRPC status with our code; INTERNAL and UNKNOWN
are bugs, as is a traceback in the diagnostics that the caller did not see. Messages are random ones
of the right type, good ones with a change, and bytes that are no message; streams end early, bring
too much or nothing. The methods are read from the descriptors: one without a row fails.

MINGA_FUZZ_EXAMPLES says how many messages each method gets; `make fuzz` sends many.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.limits import Limits
from coordinator.services.bulk import raw_handlers
from policies.cedar.methods import ACTIONS
from protocols.gen import (
    accounting_pb2,
    admin_pb2,
    bulk_pb2,
    enrolment_pb2,
    log_pb2,
    rounds_pb2,
    secure_sum_pb2,
    trust_pb2,
)
from protocols.governance.people import ask, canonical_ask
from protocols.identifiers import FederationId
from protocols.tlog.kinds import RoundJoin
from tests.contract.test_door import Upload, begin, finish, ping
from tests.support.door import Door, enrol_request
from tests.support.fuzzing import BYTES, EXAMPLES, edited, methods, raw
from tests.support.leaves import World as Leaves
from tests.support.secure_nodes import SecureNode, SecureRound
from tests.support.trust import World as Trusted
from tests.support.trust import card, signer

LIMITS = replace(
    Limits(), calls_per_s=1e6, calls_burst=1e9, joins_per_s=1e6, joins_burst=1e9, calls_open=4096
)
PATIENCE_S = 60.0
MOMENT_S = 0.15  # for methods that answer when something happens
LONG = {"Rounds/Sync", "Log/Follow", "Admin/WatchRun", "Witness/NextCheckpoint"}
REFUSED = {
    "INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "FAILED_PRECONDITION", "UNAUTHENTICATED",
    "ALREADY_EXISTS", "DATA_LOSS", "OUT_OF_RANGE", "UNAVAILABLE", "RESOURCE_EXHAUSTED",
}  # fmt: skip
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow,
                           HealthCheck.data_too_large, HealthCheck.large_base_example],
)  # fmt: skip
RAW = ("Bulk/Append", "Bulk/Put", "Bulk/Fetch")


class Recording(SecureNode):
    """An honest node whose messages are kept."""

    said: list[tuple[str, bytes]] = []  # noqa: RUF012 - of the whole file

    def post(self, kind: str, body: bytes) -> Any:
        """Hand a message in, and remember it."""
        self.said.append((kind, body))
        return super().post(kind, body)


class Errors(logging.Handler):
    """What the coordinator calls unexpected, also where the caller had gone."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        if record.name == "coordinator.services.errors" or record.exc_info:
            self.found.append(logging.Formatter().format(record))

    def none(self) -> None:
        """Nothing was found since the last time."""
        found, self.found = self.found, []
        assert not found, found[0]


class Target:
    """A served coordinator with rounds under way, callers, and good messages to start from."""

    def __init__(self, door: Door, *, log: bool) -> None:
        self.door, self.log = door, log
        self.operator = door.operator()
        self.upload = Upload(door, coordinates=3000)
        self.node = door.enrol("a")
        self.names = {"a": self.node, "operator": self.operator, "stranger": door.enrol("z")}
        state = begin(self.node, self.upload)
        self.upload_id = state.upload_id
        self.blob = bytes.fromhex(door.snapshots["r1"].theta)
        if not log:
            play = SecureRound(door, run="sec", node_type=Recording, n=4)
            play.all("join", "ready", "deal", "acknowledge", "mask", "upload")
            self.names["member"] = play.nodes["n00"].client
            self.secure = play.round
        join = RoundJoin(node="a", plan_sha256=self.upload.plan.digest, model_in=self.upload.start)
        self.leaf = Leaves().say("a", join, subject="round/r1/0")
        self.trust = Trusted().founding()
        self.seeds = seeds(self)
        self.pool = [value for rows in self.seeds.values() for row in rows for value in parts(row)]
        self.pool += [self.upload_id, self.blob, self.leaf]
        self.enrolment = grpc.secure_channel(
            door.enrolment, grpc.ssl_channel_credentials(door.root)
        )

    def channel(self, name: str, method: str) -> grpc.Channel:
        """Where a caller sends a method."""
        if method.startswith("Enrolment/"):
            return self.enrolment
        return self.names.get(name, self.node).channel


def parts(message: Message) -> Iterator[Any]:
    """The words and bytes in a message."""
    for field, value in message.ListFields():
        values = list(value) if field.is_repeated else [value]
        for item in values:
            if isinstance(item, Message):
                yield from parts(item)
            elif isinstance(item, str | bytes):
                yield item


def person_request(csr: bytes) -> bytes:
    """What an auditor of another federation would ask."""
    key = signer(card("olga", "pa-univ-1", "PA").public, "olga")
    made = ask(
        federation=FederationId("demo"), person="olga", role="auditor", csr=csr, signer=key,
        now=datetime.now(UTC),
    )  # fmt: skip
    return canonical_ask(made)


def seeds(target: Target) -> dict[str, list[Message]]:
    """A row for every method: good messages, from which the bad ones are made."""
    door, upload = target.door, target.upload
    plan, snapshot = upload.plan, door.snapshots["r1"].to_bytes()
    fresh = door.make_run("later", submit=False)
    open_ = rounds_pb2.RoundRef(run="r1", number=0)
    secure = rounds_pb2.RoundRef(run="none" if target.log else "sec", number=0)
    leaf = target.leaf if target.log else b""
    join = rounds_pb2.JoinRequest(
        round=secure, plan_digest=plan.digest, model_root=upload.start, leaf=leaf
    )
    progress = rounds_pb2.Progress(round=open_, activity="training", step=1, max_step=9)
    request = enrol_request("a", bytes(range(32)), door.signing_key("a"), leaf=leaf)
    blob = target.node.bulk.DescribeBlob(
        bulk_pb2.DescribeBlobRequest(digest=target.blob), timeout=20
    )
    used = accounting_pb2.ReportRequest(round=open_)
    used.used.source, used.used.cpu_ms = "measured", 7
    posts = [
        secure_sum_pb2.PostRequest(round=secure, kind=kind, body=body)
        for kind, body in ([] if target.log else Recording.said[-24:]) or [("ready", b"{}")]
    ]
    lists = ("start", "delivery", "go", "survivors", "commits")
    sync = rounds_pb2.SyncRequest(wait_ms=1, state="running", progress=[progress])
    return {
        "Accounting/Report": [used],
        "Admin/Invite": [admin_pb2.InviteRequest(institution="c", valid_hours=1)],
        "Admin/ListNodes": [admin_pb2.ListNodesRequest()],
        "Admin/ListRuns": [admin_pb2.ListRunsRequest()],
        "Admin/PlanRun": [admin_pb2.PlanRunRequest(plan=plan.to_bytes(), coordinates=3000)],
        "Admin/ShowRun": [admin_pb2.ShowRunRequest(run="r1")],
        "Admin/StopRun": [admin_pb2.StopRunRequest(run="stopped", reason="for the test")],
        "Admin/SubmitRun": [
            admin_pb2.SubmitRunRequest(
                plan=fresh.to_bytes(), snapshot=door.snapshots["later"].to_bytes()
            ),
            admin_pb2.SubmitRunRequest(plan=plan.to_bytes(), snapshot=snapshot),
        ],
        "Admin/WatchRun": [admin_pb2.WatchRunRequest(run="r1")],
        "Admin/Why": [admin_pb2.WhyRequest(round=open_), admin_pb2.WhyRequest(round=secure)],
        "Bulk/BeginPut": [blob],
        "Bulk/BeginUpload": [upload.request()],
        "Bulk/DescribeBlob": [bulk_pb2.DescribeBlobRequest(digest=target.blob)],
        "Bulk/FinishUpload": [bulk_pb2.FinishUploadRequest(upload_id=target.upload_id, leaf=leaf)],
        "Enrolment/Join": [request],
        "Enrolment/JoinPerson": [
            enrolment_pb2.PersonEnrolRequest(
                request=person_request(request.csr_der), csr_der=request.csr_der
            )
        ],
        "Log/Deliver": [log_pb2.SubmitRequest(entries=[target.leaf])],
        "Log/Follow": [log_pb2.FollowRequest(size=0)],
        "Log/Prove": [log_pb2.ProveRequest(leaf_hash=bytes(32))],
        "Log/Submit": [log_pb2.SubmitRequest(entries=[target.leaf])],
        "Renewal/Renew": [enrolment_pb2.RenewRequest(csr_der=request.csr_der, leaf=leaf)],
        "Rounds/Confirm": [rounds_pb2.ConfirmRequest(round=open_, model_root=upload.start)],
        "Rounds/Decline": [
            rounds_pb2.DeclineRequest(round=open_, rule="site.rule", reason="no", leaf=leaf)
        ],
        "Rounds/GetPlan": [rounds_pb2.GetPlanRequest(run="r1")],
        "Rounds/Join": [join],
        "Rounds/Leave": [rounds_pb2.LeaveRequest(round=open_, code="slow", reason="no")],
        "Rounds/Ready": [rounds_pb2.ReadyRequest(round=secure, model_root=upload.start)],
        "Rounds/Sync": [sync],
        "SecureSum/Get": [
            secure_sum_pb2.GetRequest(round=secure, attempt=1, kind=kind) for kind in lists
        ],
        "SecureSum/Post": posts,
        "Trust/Approvals": [trust_pb2.ApprovalsRequest(nodes=["a"])],
        "Trust/File": [trust_pb2.TrustFileRequest(name="metadata/root.json")],
        "Trust/Publish": [trust_pb2.PublishTrustRequest(files={"metadata/2.root.json": b"{}"})],
        "Witness/NextCheckpoint": [log_pb2.WitnessAnswer(), log_pb2.WitnessAnswer(status=200)],
    }


@pytest.fixture(scope="module")
def errors() -> Iterator[Errors]:
    found = Errors()
    logging.getLogger().addHandler(found)
    yield found
    logging.getLogger().removeHandler(found)


def opened(folder: Any, *, log: bool) -> Iterator[Target]:
    door = Door(folder, log=log)
    door.config = replace(door.config, limits=LIMITS)
    door.start()
    try:
        yield Target(door, log=log)
    finally:
        door.stop()


@pytest.fixture(scope="module")
def plain(tmp_path_factory, errors) -> Iterator[Target]:
    yield from opened(tmp_path_factory.mktemp("plain"), log=False)


@pytest.fixture(scope="module")
def logged(tmp_path_factory, errors) -> Iterator[Target]:
    yield from opened(tmp_path_factory.mktemp("logged"), log=True)


# -- one call ------------------------------------------------------------------------------------


def check_answer(error: grpc.RpcError | None, method: str) -> None:
    """A call was answered, or refused with a status and a code of ours."""
    if error is None:
        return
    status, trailing = error.code().name, dict(error.trailing_metadata() or ())
    if status == "DEADLINE_EXCEEDED" and method in LONG:
        return
    if status == "RESOURCE_EXHAUSTED" and "larger than max" in error.details():
        return  # gRPC's own words, before anything of ours sees a byte
    assert status in REFUSED, f"{method}: {status} {error.details()}"
    assert trailing.get("minga-code"), f"{method}: {status} {error.details()}"


def knock(
    channel: grpc.Channel, method: str, sent: list[bytes], metadata: Any = (), most: int = 4
) -> None:
    """Send raw messages to a method, read a few answers, and look at how it ended."""
    call = channel.stream_stream(f"/minga.v1.{method}", None, None)
    patience = MOMENT_S if method in LONG else PATIENCE_S
    answers = call(iter(sent), metadata=metadata, timeout=patience)
    try:
        for count, _ in enumerate(answers, start=1):
            if count >= most:
                answers.cancel()
                return
    except grpc.RpcError as error:
        check_answer(error, method)


def test_every_method_has_a_row(plain):
    """Also those that the rules know, and the raw ones of bulk data."""
    found = {name for name, _ in methods()}
    assert plain.seeds.keys() == found

    class Service:
        append = put = fetch = None

    served = raw_handlers(Service)._method_handlers  # type: ignore[arg-type]
    assert {name.removeprefix("/minga.v1.") for name in served} == set(RAW)
    assert found | set(RAW) == ACTIONS.keys()


METHODS = dict(methods())
LOGGED = ("Log/", "Witness/", "Trust/", "Rounds/", "Bulk/FinishUpload", "Enrolment/", "Renewal/",
          "Admin/SubmitRun")  # fmt: skip


@pytest.mark.parametrize("name", sorted(METHODS))
@FUZZ
@given(data=st.data())
def test_a_method_answers_or_refuses(plain, logged, errors, name, data):
    known = [plain]
    if name.startswith(LOGGED):
        known = [logged] if name.startswith(("Log/", "Witness/")) else [plain, logged]
    target = data.draw(st.sampled_from(known))
    caller = data.draw(st.sampled_from(sorted(target.names)))
    one = raw(METHODS[name].input_type, target.seeds[name], target.pool)
    sent = data.draw(one.map(lambda message: [message]) | st.lists(one, max_size=3))
    knock(target.channel(caller, name), name, sent)
    errors.none()


@FUZZ
@given(data=st.data())
def test_raw_uploads_are_taken_or_refused(plain, errors, data):
    """Append and Put: any offset, any id, any bytes, any number of messages."""
    name = data.draw(st.sampled_from(RAW[:2]))
    caller = data.draw(st.sampled_from(sorted(plain.names)))
    upload_id = data.draw(st.sampled_from([plain.upload_id, plain.blob, b"", bytes(32)]))
    offset = data.draw(
        st.sampled_from(["0", "1", "-1", "4194304", "9" * 15, "9" * 16, "1e3", " 0", "x", ""])
    )
    metadata = [("minga-upload-bin", upload_id), ("minga-digest-bin", upload_id)]
    if data.draw(st.booleans()):
        metadata.append(("minga-offset", offset))
    good = plain.upload.data
    chunk = st.sampled_from([good, good[:100], bytes(2**20), bytes(2**20 + 1), *BYTES])
    sent = data.draw(st.lists(chunk, max_size=3))
    knock(plain.names[caller].channel, name, sent, metadata)
    errors.none()


@FUZZ
@given(data=st.data())
def test_raw_downloads_are_given_or_refused(plain, errors, data):
    digest = data.draw(st.sampled_from([plain.blob, bytes(32), b"../" * 11, plain.upload_id]))
    offset = data.draw(st.integers(0, 2**64 - 1) | st.integers(0, 20_000))
    good = digest + offset.to_bytes(8, "big")
    sent = data.draw(st.just(good) | edited(good) | st.binary(max_size=50))
    round_ = data.draw(
        st.sampled_from(["r1/0", "", "../x/1", "r1/999999", "r1/" + "9" * 5000, "a" * 300])
    )
    caller = data.draw(st.sampled_from(sorted(plain.names)))
    for metadata in ((), (("minga-round", round_),)):
        knock(plain.names[caller].channel, "Bulk/Fetch", [sent], metadata)
    errors.none()


@pytest.mark.parametrize(
    "method", ["Rounds/Nothing", "Nothing/Sync", "", "Rounds", "../Rounds/Sync", "Rounds/Sync/x"]
)
def test_a_method_that_is_none_is_not_implemented(plain, method):
    with pytest.raises(grpc.RpcError) as caught:
        plain.node.channel.unary_unary(f"/minga.v1.{method}", None, None)(b"", timeout=20)
    assert caught.value.code().name == "UNIMPLEMENTED"


# -- what was found ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "sent", "status"),
    [
        # the coordinator looked for headers of an attempt that nobody had uploaded in: KeyError
        ("member", "SecureSum/Get", [secure_sum_pb2.GetRequest(
            round=rounds_pb2.RoundRef(run="sec", number=0), attempt=255, kind="survivors")],
         "FAILED_PRECONDITION"),
        # a stream that ends before its first message: StopAsyncIteration
        ("a", "Witness/NextCheckpoint", [], "INVALID_ARGUMENT"),
        # a number that no database has: OverflowError in SQLite
        ("operator", "Admin/WatchRun", [admin_pb2.WatchRunRequest(run="r1", after=2**63)],
         "INVALID_ARGUMENT"),
        # bytes that are no message: gRPC itself says UNKNOWN
        ("a", "Rounds/Join", [b"\xff\xff"], "INVALID_ARGUMENT"),
        ("a", "Rounds/Sync", [], "INVALID_ARGUMENT"),
    ],
)  # fmt: skip
def test_reproductions(plain, logged, name, method, sent, status):
    raws = [one if isinstance(one, bytes) else one.SerializeToString() for one in sent]
    target = logged if method.startswith("Witness/") else plain
    call = target.names[name].channel.stream_stream(f"/minga.v1.{method}", None, None)
    with pytest.raises(grpc.RpcError) as caught:
        list(call(iter(raws), timeout=PATIENCE_S))
    assert caught.value.code().name == status
    assert dict(caught.value.trailing_metadata())["minga-code"]


# -- afterwards ----------------------------------------------------------------------------------


def test_an_honest_node_is_served_afterwards(plain, logged, errors):
    for target in (plain, logged):
        assert ping(target.node).now_ms > 0
        assert target.operator.admin.ListRuns(admin_pb2.ListRunsRequest(), timeout=20).runs
    upload = Upload(plain.door, coordinates=5000, run="afterwards")
    state = begin(plain.node, upload)
    plain.node.append(state.upload_id, state.durable, upload.messages(start=state.durable))
    assert finish(plain.node, state.upload_id) == upload.header().receipt
    now = datetime.now(UTC)
    assert plain.door.ledger(lambda tx: tx.round(upload.round).phase).closes_at > now
    errors.none()


def test_the_oracle_convicts():
    """INTERNAL, UNKNOWN and a status without our code are not let pass."""

    class Answer(grpc.RpcError):
        def __init__(self, status, trailing=()):
            self.code = lambda: status
            self.trailing_metadata = lambda: trailing
            self.details = lambda: "x"

    check_answer(Answer(grpc.StatusCode.NOT_FOUND, (("minga-code", "not_found"),)), "Log/Prove")
    for status in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        with pytest.raises(AssertionError):
            check_answer(Answer(status, (("minga-code", "internal"),)), "Log/Prove")
    with pytest.raises(AssertionError):
        check_answer(Answer(grpc.StatusCode.NOT_FOUND), "Log/Prove")
    with pytest.raises(AssertionError):
        check_answer(Answer(grpc.StatusCode.DEADLINE_EXCEEDED), "Log/Prove")
