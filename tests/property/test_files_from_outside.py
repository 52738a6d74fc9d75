"""Files and answers that a process did not write itself: read, or refused with one of our errors.

``test_parsers_from_outside`` has the parsers of documents; here is what reads files around them: a
log that somebody mirrored, the configuration that a person wrote, the spool between agent and
worker, a plan, what Slurm prints, and what a hostile coordinator answers to a node or an operator.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.config import load_config as coordinator_config
from infra.audit.folder import read_log, read_trust_policy
from infra.runs.facts import read_run_facts
from infra.runs.plan_file import read_plan_file
from node_agent.config import NodeFolder
from node_agent.config import load_config as node_config
from node_agent.launchers.slurm_rules import read_accounts, read_ends, read_queue
from node_agent.spool import Spool, last_status, read_job, read_spent, read_status, read_worker
from node_agent.status import read_status as read_node_status
from node_agent.view import read_view
from protocols.errors import FederationError, MalformedMessageError
from protocols.gen import admin_pb2, rounds_pb2
from protocols.rounds_codec import to_ms
from tests.support.audit_disk import copy_run
from tests.support.fuzzing import EXAMPLES, changed, edited, messages
from tests.support.plans import MANIFEST, plan
from tests.support.trust import NOW

SOME = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
JOB = {
    "schema": "minga.job/1", "id": "r1.0", "run": "r1", "round": 0, "plan": "/p", "manifest": "/m",
    "theta": "/t", "select": "all", "seed": 1,
}  # fmt: skip
QUEUE = {
    "jobs": [
        {"job_id": 7, "name": "minga", "comment": "c", "job_state": ["RUNNING"], "submit_time": 5}
    ]
}
NODE = """
institution = "a"
federation = "demo"
coordinator = "127.0.0.1:1"
"""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys."""
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield value, key
            yield from places(value[key])


@st.composite
def json_like(draw: st.DrawFn, value: Any) -> bytes:
    """A document with one value replaced, or some bytes of it."""
    if draw(st.booleans()):
        return draw(edited(json.dumps(value).encode()))
    copy = json.loads(json.dumps(value))
    where, key = draw(st.sampled_from(list(places(copy))))
    where[key] = draw(JSON)
    return json.dumps(copy).encode()


def at(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    """A reader of one file in a folder."""

    def reads(folder: Path, data: bytes) -> object:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return read(folder)

    return reads


def in_spool(name: str, read: Callable[[Spool], object]) -> Callable[[Path, bytes], object]:
    """A reader of one file of a spool."""
    return at(f"spool/{name}", lambda folder: read(Spool(folder / "spool")))


EVENT = {"at": 1.0, "event": "step", "step": 1}
WORKER = {
    "schema": "minga.worker/1", "pid": 1, "ranks": 1, "backend": "none", "device": "cpu",
    "torch": "2", "started_at": 1.0,
}  # fmt: skip
READERS: dict[str, tuple[Callable[[Path, bytes], object], Any]] = {
    "plan file": (
        at("plan.json", lambda f: read_plan_file(f / "plan.json")),
        json.loads(plan().to_bytes()),
    ),
    "job": (at("r1.0.json", lambda f: read_job(f / "r1.0.json")), JOB),
    "worker": (in_spool("worker.json", read_worker), WORKER),
    "squeue": (lambda _, data: read_queue(data), QUEUE),
    "sacct": (lambda _, data: read_accounts(data, 7), {"jobs": [{"job_id": 7, "state": "DONE"}]}),
    "node status": (at("status.json", lambda f: read_node_status(f / "status.json")), {"a": 1}),
}


@pytest.mark.parametrize("name", sorted(READERS))
@SOME
@given(data=st.data())
def test_a_file_is_read_or_refused(tmp_path, name, data):
    read, seed = READERS[name]
    with suppress(FederationError):
        read(tmp_path, data.draw(json_like(seed)))


@SOME
@given(data=st.data())
def test_what_a_worker_says_is_read_or_refused(tmp_path, data):
    spool = Spool(tmp_path / "spool")
    for path in (spool.status("r1.0"), spool.spent("r1.0")):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [data.draw(json_like(EVENT)) for _ in range(data.draw(st.integers(0, 3)))]
        path.write_bytes(b"\n".join(lines) + data.draw(st.sampled_from([b"", b"\n"])))
    for read in (read_status, last_status):
        with suppress(FederationError):
            read(spool, "r1.0")
    read_spent(spool, "r1.0")


@pytest.mark.parametrize("state", ["", " ", [], [" "], {}, {"current": []}, 7, None])
def test_a_job_without_a_state_is_refused(state):
    """A state of spaces alone was an IndexError."""
    with pytest.raises(MalformedMessageError):
        read_queue(json.dumps({"jobs": [{"job_id": 7, "job_state": state}]}).encode())


@SOME
@given(text=st.text(max_size=60) | st.just("7 0 1 0 none\n8 0 1 0 none\n"))
def test_ends_in_slurm_are_read(text):
    read_ends(text, 7)


TOML = """federation = "demo"
[listen]
address = "a:1"
enrolment = "a:2"
public_address = "a:1"
[ledger]
url = "sqlite:///l"
[limits]
calls_per_s = 5
[[privacy.budget]]
epsilon = 8.0
delta = 1e-6
"""


@pytest.mark.parametrize("name", ["coordinator", "node"])
@SOME
@given(data=st.data())
def test_a_configuration_is_read_or_refused(tmp_path, name, data):
    text = TOML if name == "coordinator" else NODE
    damaged = data.draw(edited(text.encode()))
    (tmp_path / "config.toml").write_bytes(damaged)
    with suppress(FederationError):
        if name == "coordinator":
            coordinator_config(tmp_path / "config.toml")
        else:
            node_config(NodeFolder(tmp_path))


def test_the_seeds_are_read(tmp_path):
    for read, seed in READERS.values():
        read(tmp_path, json.dumps(seed).encode())
    assert tomllib.loads(TOML)
    (tmp_path / "config.toml").write_text(TOML)
    assert coordinator_config(tmp_path / "config.toml").limits.calls_per_s == 5


# -- answers of a hostile coordinator --------------------------------------------------------------


def shown() -> rounds_pb2.SyncResponse:
    """A good answer to Sync."""
    from protocols.tensors.ring import Ring
    from protocols.tensors.scales import initial_scales
    from protocols.tensors.snapshot import Snapshot

    made = plan()
    scales = initial_scales(MANIFEST, made.vector.scale, Ring(20), 3)
    snapshot = Snapshot.initial(MANIFEST, made.digest, scales).to_bytes()
    current = rounds_pb2.RoundView(
        round=rounds_pb2.RoundRef(run="r1", number=0), start_snapshot=snapshot
    )
    current.phase.name = "Open"
    run = rounds_pb2.RunView(run="r1", plan_digest=made.digest, status="active", current=current)
    return rounds_pb2.SyncResponse(version=1, now_ms=to_ms(NOW), runs=[run])


ANSWER = shown()


@settings(max_examples=3 * EXAMPLES, deadline=None)
@given(message=changed(ANSWER) | messages(rounds_pb2.SyncResponse.DESCRIPTOR))
def test_a_node_reads_or_refuses_what_a_coordinator_shows(message):
    with suppress(FederationError):
        read_view(message)


@settings(max_examples=2 * EXAMPLES, deadline=None)
@given(run=st.data())
def test_a_node_reads_or_refuses_one_run(run):
    made = rounds_pb2.SyncResponse(version=1, now_ms=to_ms(NOW))
    made.runs.append(run.draw(changed(ANSWER.runs[0])))
    with suppress(FederationError):
        read_view(made)


@settings(max_examples=2 * EXAMPLES, deadline=None)
@given(message=messages(admin_pb2.RunFacts.DESCRIPTOR))
def test_an_operator_reads_or_refuses_what_a_coordinator_tells(message):
    with suppress(FederationError):
        read_run_facts(message)


def test_a_good_answer_is_read():
    assert read_view(ANSWER).runs[0].current is not None


# -- a log that somebody mirrored ------------------------------------------------------------------


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    return copy_run(tmp_path_factory.mktemp("mirrored") / "log")


@settings(max_examples=2 * EXAMPLES, deadline=None)
@given(data=st.data())
def test_a_damaged_log_is_read_or_refused(mirrored, data):
    """Whatever one file holds: the reader says what is torn, or that it cannot be read."""
    folder = mirrored / "log" if (mirrored / "log").is_dir() else mirrored
    path = data.draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.is_file())))
    good = path.read_bytes()
    path.write_bytes(data.draw(edited(good) | st.binary(max_size=40)))
    try:
        with suppress(FederationError):
            read_log(folder)
        with suppress(FederationError):
            read_trust_policy(folder / "trust-policy.txt")
    finally:
        path.write_bytes(good)
    assert read_log(folder).torn == ()
