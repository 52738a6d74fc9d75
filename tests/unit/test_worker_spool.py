"""The spool's documents: strict where the agent believes them, tolerant where a line is torn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from node_agent.spool import (
    DataPaths,
    DeltaWriter,
    Evaluation,
    Job,
    Result,
    Spool,
    StatusWriter,
    WorkerInfo,
    alive_age,
    atomic_write,
    forget_job,
    forget_run,
    job_id,
    last_status,
    parse_job_id,
    read_job,
    read_result,
    read_status,
    read_worker,
    request_cancel,
    write_job,
)
from protocols.errors import (
    DigestMismatchError,
    MalformedMessageError,
    ManifestMismatchError,
    NonFiniteUpdateError,
)
from protocols.identifiers import RoundId, RunId
from protocols.tensors.manifest import Manifest, TensorSpec
from protocols.tensors.units import blob_digest

MANIFEST = Manifest((TensorSpec("w", (2, 3)), TensorSpec("b", (3,)), TensorSpec("c", (2,))))
JOB = Job(
    id="andes-7.3",
    run="andes-7",
    round=3,
    plan="/n/plan.json",
    manifest="/n/manifest.json",
    theta="/n/theta.f32",
    select="all",
    data=DataPaths(train=("/d/train",), valid=("/d/valid",)),
    max_steps=10,
    seed=1,
)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool").make()


def written(spool: Spool, job: Job = JOB, *, delta: np.ndarray | None = None) -> Result:
    """A finished job: all coordinates of the selected tensors, or ``delta``."""
    delta = np.arange(11, dtype="<f4") if delta is None else delta
    with DeltaWriter(spool.delta(job.id)) as writer:
        writer.add("all", delta)
        summary = writer.commit()
    result = Result(
        id=job.id,
        steps=2,
        tokens=20,
        records=4,
        loss_nats=5.5,
        seconds=0.25,
        delta_root=summary.root,
        delta_coordinates=summary.coordinates,
        delta_norm=summary.norm,
        evaluation=(Evaluation(language="es", nll_nats=3.25, bytes=9, documents=2),),
        rank_steps=(2,),
        device="cpu",
    )
    atomic_write(spool.result(job.id), result.to_bytes())
    return result


# -- jobs ----------------------------------------------------------------------------------------


def test_a_job_comes_back_as_it_was_written(spool):
    write_job(spool, JOB)

    assert read_job(spool.job(JOB.id)) == JOB
    assert json.loads(spool.job(JOB.id).read_bytes())["schema"] == "minga.job/1"
    assert [path.name for path in spool.jobs.iterdir()] == ["andes-7.3.json"]  # no temporary left


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("an unknown field", {"colour": "red"}),
        ("a missing field", {"theta": None}),
        ("another schema", {"schema": "minga.job/2"}),
        ("a name that is not the round's", {"id": "andes-7.4"}),
        ("a run that is a path", {"run": "../x", "id": "../x.3"}),
        ("a relative path", {"plan": "plan.json"}),
        ("relative data", {"data": {"train": ["x.jsonl"], "valid": []}}),
        ("a step count as text", {"max_steps": "10"}),
        ("no step at all", {"max_steps": 0}),
        ("a round that is no number", {"round": True}),
        ("an empty selection", {"select": []}),
        ("a negative seed", {"seed": -1}),
        ("no threads", {"threads": 0}),
    ],
)
def test_a_malformed_job_is_refused_in_one_sentence(spool, what, change):
    value = json.loads(JOB.to_bytes()) | change
    if value["theta"] is None:
        del value["theta"]
    path = spool.job(JOB.id)
    path.write_text(json.dumps(value), encoding="utf-8")

    with pytest.raises(MalformedMessageError) as refused:
        read_job(path)

    assert str(refused.value).startswith("andes-7.3.json: "), what
    assert "\n" not in str(refused.value)


def test_a_job_under_another_name_is_refused(spool):
    path = spool.job("andes-7.4")
    path.write_bytes(JOB.to_bytes())

    with pytest.raises(MalformedMessageError, match=r"the job inside is called andes-7\.3"):
        read_job(path)


def test_job_names_are_rounds():
    round_ = RoundId(RunId("andes-7"), 42)

    assert parse_job_id(job_id(round_)) == round_
    for wrong in ("andes-7", "andes-7.", "andes-7.042", ".1", "a/b.1", "a.1.json", "A.1"):
        with pytest.raises(MalformedMessageError):
            parse_job_id(wrong)


def test_asking_again_for_the_same_work_keeps_the_result(spool):
    write_job(spool, JOB)
    result = written(spool)

    write_job(spool, JOB.model_copy(update={"deadline_unix": 99.0}))

    assert read_result(spool, JOB, MANIFEST) == result


def test_asking_for_other_work_forgets_the_old_result(spool):
    write_job(spool, JOB)
    written(spool)

    write_job(spool, JOB.model_copy(update={"theta": "/n/other.f32"}))

    assert read_result(spool, JOB, MANIFEST) is None
    assert not spool.delta(JOB.id).exists()


def test_asking_again_lets_a_failed_or_cancelled_job_run(spool):
    write_job(spool, JOB)
    request_cancel(spool, JOB.id)
    StatusWriter(spool.status(JOB.id), now=lambda: 1.0).event("cancelled")

    write_job(spool, JOB)

    assert read_status(spool, JOB.id) == ()
    assert not spool.cancel(JOB.id).exists()


def test_a_forgotten_job_leaves_only_the_state(spool):
    write_job(spool, JOB)
    written(spool)
    spool.state(JOB.run).mkdir()

    forget_job(spool, JOB.id)

    assert not spool.out(JOB.id).exists()
    assert not spool.job(JOB.id).exists()
    assert spool.state(JOB.run).exists()


def test_a_run_that_is_over_leaves_nothing(spool):
    others = JOB.model_copy(update={"id": "andes-70.3", "run": "andes-70"})
    for job in (JOB, others):
        write_job(spool, job)
        written(spool, job)
        spool.state(job.run).mkdir()
    request_cancel(spool, JOB.id)

    forget_run(spool, "andes-7")

    left = {path.name for path in spool.root.rglob("*") if "andes" in path.name}
    assert left == {"andes-70.3.json", "andes-70.3", "andes-70"}
    with pytest.raises(MalformedMessageError):
        forget_run(spool, "../..")


# -- status --------------------------------------------------------------------------------------


def test_events_come_back_in_order(spool):
    status = StatusWriter(spool.status("a.0"), now=iter((1.5, 2.5, 3.5)).__next__)
    status.event("started")
    status.event("progress", step=3, max_steps=9, tokens=96, loss=2.25, tokens_per_s=10.0)
    status.event("failed", code="data.empty", message="no\ntext " * 200)

    first, second, third = read_status(spool, "a.0")

    assert (first.event, first.at) == ("started", 1.5)
    assert (second.step, second.max_steps, second.loss) == (3, 9, 2.25)
    assert third.code == "data.empty"
    assert third.message is not None
    assert len(third.message) == 500  # one short line, whatever the reason was
    assert "\n" not in third.message
    assert last_status(spool, "a.0") == third


def test_a_line_that_is_still_being_written_is_left_out(spool):
    StatusWriter(spool.status("a.0"), now=lambda: 1.0).event("started")
    with spool.status("a.0").open("ab") as file:
        file.write(b'{"at": 2.0, "ev')

    assert [event.event for event in read_status(spool, "a.0")] == ["started"]
    last = last_status(spool, "a.0")
    assert last is not None
    assert last.event == "started"


def test_an_event_of_a_newer_worker_is_read_and_nonsense_is_not(spool):
    path = spool.status("a.0")
    path.parent.mkdir()
    path.write_bytes(b'{"at": 2.0, "event": "done", "new_field": 1}\n')
    assert read_status(spool, "a.0")[0].event == "done"

    path.write_bytes(b'{"at": 2.0, "event": "exploded"}\n')
    with pytest.raises(MalformedMessageError, match="event"):
        read_status(spool, "a.0")


def test_the_last_event_is_found_behind_many(spool):
    status = StatusWriter(spool.status("a.0"), now=lambda: 1.0)
    for step in range(2000):
        status.event("progress", step=step)

    last = last_status(spool, "a.0")
    assert last is not None
    assert last.step == 1999


def test_nobody_serves_a_new_spool(spool):
    assert read_worker(spool) is None
    assert alive_age(spool, now=1.0) is None
    assert last_status(spool, "a.0") is None


def test_who_serves_a_spool(spool):
    info = WorkerInfo(pid=1, ranks=2, backend="gloo", device="cpu", torch="2", started_at=1.0)
    atomic_write(spool.worker, info.to_bytes())
    spool.alive.touch()

    assert read_worker(spool) == info
    touched = spool.alive.stat().st_mtime
    assert alive_age(spool, now=touched + 2.5) == pytest.approx(2.5)


# -- results -------------------------------------------------------------------------------------


def test_a_result_comes_back_with_its_bytes_checked(spool):
    result = written(spool)

    assert read_result(spool, JOB, MANIFEST) == result
    assert result.delta_norm == pytest.approx(math.sqrt(sum(i * i for i in range(11))))
    assert result.root == blob_digest(np.arange(11, dtype="<f4").tobytes())


def test_a_flipped_bit_is_seen(spool):
    written(spool)
    data = bytearray(spool.delta(JOB.id).read_bytes())
    data[5] ^= 1
    spool.delta(JOB.id).write_bytes(data)

    with pytest.raises(DigestMismatchError):
        read_result(spool, JOB, MANIFEST)


@pytest.mark.parametrize("size", [0, 43, 40, 48])
def test_another_size_is_seen(spool, size):
    written(spool)
    spool.delta(JOB.id).write_bytes(bytes(size))

    with pytest.raises(ManifestMismatchError):
        read_result(spool, JOB, MANIFEST)


def test_a_missing_update_is_seen(spool):
    written(spool)
    spool.delta(JOB.id).unlink()

    with pytest.raises(ManifestMismatchError):
        read_result(spool, JOB, MANIFEST)


def test_an_update_of_other_tensors_is_seen(spool):
    job = JOB.model_copy(update={"select": ("b",)})
    written(spool, job)  # 11 coordinates, b has 3

    with pytest.raises(ManifestMismatchError, match="the selected tensors have 3"):
        read_result(spool, job, MANIFEST)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_seen_by_reader_and_writer(spool, poison):
    written(spool)
    bad = np.arange(11, dtype="<f4")
    bad[7] = poison
    spool.delta(JOB.id).write_bytes(bad.tobytes())

    with pytest.raises(NonFiniteUpdateError, match="coordinate 7"):
        read_result(spool, JOB, MANIFEST)
    with DeltaWriter(spool.delta("x.0")) as writer, pytest.raises(NonFiniteUpdateError, match="w2"):
        writer.add("w2", bad)
    assert list(spool.out("x.0").iterdir()) == []  # neither the file nor its temporary


def test_a_result_for_another_job_is_refused(spool):
    result = written(spool)
    other = result.model_copy(update={"id": "andes-7.4"})
    atomic_write(spool.result(JOB.id), other.to_bytes())

    with pytest.raises(MalformedMessageError, match=r"is for andes-7\.4"):
        read_result(spool, JOB, MANIFEST)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", -1),
        ("tokens", 1.5),
        ("loss_nats", math.nan),
        ("delta_root", "ff"),
        ("evaluation", [{"language": "es", "nll_nats": -1.0, "bytes": 1, "documents": 1}]),
        ("extra", 1),
    ],
)
def test_a_malformed_result_is_refused(spool, field, value):
    value_ = json.loads(written(spool).to_bytes()) | {field: value}
    spool.result(JOB.id).write_text(json.dumps(value_), encoding="utf-8")

    with pytest.raises(MalformedMessageError, match=r"result of andes-7\.3"):
        read_result(spool, JOB, MANIFEST)


def test_an_empty_update_has_the_root_of_nothing(spool):
    job = JOB.model_copy(update={"select": "none"})
    result = written(spool, job, delta=np.empty(0, dtype="<f4"))

    assert read_result(spool, job, MANIFEST) == result
    assert result.root == blob_digest(b"")
    assert result.delta_norm == 0.0


def test_an_update_is_hashed_alike_in_one_piece_or_many(spool):
    whole = np.random.default_rng(0).standard_normal(3 * 2**20 + 17).astype("<f4")
    with DeltaWriter(spool.delta("x.0")) as writer:
        for part in np.array_split(whole, 7):
            writer.add("t", part)
        summary = writer.commit()

    assert summary.root == blob_digest(whole.tobytes())
    assert summary.coordinates == whole.size
    assert summary.norm == pytest.approx(float(np.linalg.norm(whole.astype(np.float64))))
    assert spool.delta("x.0").read_bytes() == whole.tobytes()
