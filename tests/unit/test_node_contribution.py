"""From a local step to a signed vector; from a sum to the next model."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node_agent.contribution import (
    LocalWork,
    Terms,
    make_contribution,
    metrics_of,
    synthetic_work,
    update_norm,
    upload_name,
    work_of_result,
)
from node_agent.models import Models
from node_agent.spool import Result, atomic_write
from protocols.crypto.signatures import public_bytes
from protocols.errors import (
    CorruptStateError,
    IntegrityError,
    ManifestMismatchError,
    NonFiniteUpdateError,
    NotFoundError,
)
from protocols.identifiers import RoundId, RunId
from protocols.plan import Plan
from protocols.round_vector import round_layout, round_ring
from protocols.tensors.manifest import Manifest, TensorSpec
from protocols.tensors.metrics import decode_metrics
from protocols.tensors.planar import PackedVector
from protocols.tensors.scales import initial_scales
from protocols.tensors.snapshot import Snapshot
from protocols.tensors.units import blob_digest, unit_hashes
from protocols.upload import check_unit_hashes, verify_header
from tests.support.node import ME, RUN
from tests.support.plans import plan_value

D = 70_000  # more than one scale block
MANIFEST = Manifest((TensorSpec("w", (60_000,)), TensorSpec("b", (10_000,))))
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SEED = bytes(32)


def the_plan(**changes):
    model = {"family": "vector", "manifest": MANIFEST.digest, "initial": "0" * 64}
    vector = {"ring_bits": 20, "scale": {"mode": "fixed", "exponent": 12}}
    return Plan.from_value(plan_value(**({"model": model, "vector": vector} | changes)))


def scales_of(plan):
    return initial_scales(MANIFEST, plan.vector.scale, round_ring(plan), len(plan.roster))


def work(delta, **changes):
    values = {
        "tokens": 500,
        "records": 7,
        "steps": 3,
        "loss_nats": 12.25,
        "seconds": 1.5,
        "evaluation": {"es": (2.5, 40, 2)},
    }
    return LocalWork(delta=delta, **values | changes)


def make(tmp_path, plan, local, **changes):
    uploads = tmp_path / "uploads"
    uploads.mkdir(exist_ok=True)
    terms = {
        "plan": plan,
        "node": ME,
        "round": RoundId(RUN, 4),
        "index": 0,
        "attempt": 1,
        "model_root": plan.model.initial,
    }
    record = make_contribution(
        local,
        terms=Terms(**terms | changes),
        manifest=MANIFEST,
        scales=scales_of(plan),
        seed=SEED,
        signing_key=KEY,
        uploads=uploads,
    )
    return record, (uploads / record.file).read_bytes()


def read_back(plan, data):
    """Model integers and metrics of a packed vector."""
    layout = round_layout(plan, 0, MANIFEST)
    packed = PackedVector(data, layout.coordinates, round_ring(plan))
    out = np.empty(layout.coordinates, np.int32)
    packed.read_centred(0, layout.coordinates, out)
    metrics = decode_metrics(out[layout.model_coordinates :], layout.metrics, nodes=1)
    return out[: layout.model_coordinates], metrics


def test_the_vector_holds_the_update_and_the_metrics(tmp_path):
    plan = the_plan(evaluation={"languages": ["es", "pt"]})
    delta = (np.arange(D, dtype=np.float32) % 97 - 48) / 4096  # on the grid: nothing is rounded

    _, data = make(tmp_path, plan, work(delta))
    integers, metrics = read_back(plan, data)

    assert np.array_equal(integers, np.arange(D) % 97 - 48)
    assert metrics == {
        "weight": 65_536,
        "nodes": 1,
        "tokens": 500,
        "records": 7,
        "steps": 3,
        "loss_micronats": 12_250_000,
        "train_ms": 1500,
        "clamped": 0,
        "nll_millinats/es": 2500,
        "bytes/es": 40,
        "documents/es": 2,
        "nll_millinats/pt": 0,
        "bytes/pt": 0,
        "documents/pt": 0,
    }


def test_the_header_binds_everything_and_is_signed(tmp_path):
    plan = the_plan()
    record, data = make(tmp_path, plan, work(np.zeros(D, np.float32)), attempt=3)

    header = verify_header(public_bytes(KEY), record.header, record.signature)

    check_unit_hashes(header, record.unit_hashes)
    assert record.unit_hashes == unit_hashes(data)
    assert (header.run, header.round, header.attempt, header.node) == ("r1", 4, 3, "a")
    assert (header.plan, header.model) == (plan.digest, plan.model.initial)
    assert (header.size, header.root) == (len(data), blob_digest(data))
    assert record.file == upload_name(RoundId(RUN, 4), 3)
    assert [path.name for path in (tmp_path / "uploads").iterdir()] == [record.file]


def test_a_constant_is_the_same_as_its_array(tmp_path):
    plan = the_plan()
    layout = round_layout(plan, 0, MANIFEST)
    constant = synthetic_work(0.00031, layout)
    whole = work(np.full(D, 0.00031, np.float32), evaluation={}, **dict.fromkeys(
        ("tokens", "records", "steps"), 0), loss_nats=0.0, seconds=0.0)  # fmt: skip

    assert constant.delta.strides == (0,)  # nothing is materialised
    assert update_norm(constant.delta, layout) == pytest.approx(
        update_norm(whole.delta, layout), rel=1e-12
    )
    assert make(tmp_path, plan, constant)[1] == make(tmp_path, plan, whole)[1]


def test_clip_and_weight(tmp_path):
    """Norm 2 under a clip of 1 halves; 250 of 1,000 tokens weigh a quarter."""
    vector = {
        "clip_norm": 1.0,
        "weight_cap_tokens": 1000,
        "scale": {"mode": "fixed", "exponent": 16},
    }
    plan = the_plan(vector=vector)
    delta = np.zeros(D, np.float32)
    delta[[3, 65_000]] = [2.0**0.5, -(2.0**0.5)]

    integers, metrics = read_back(plan, make(tmp_path, plan, work(delta, tokens=250))[1])

    wanted = 2.0**0.5 / 2 / 4 * 2**16
    assert abs(integers[3] - wanted) <= 1
    assert abs(integers[65_000] + wanted) <= 1
    assert np.count_nonzero(integers) == 2
    assert metrics["weight"] == 16_384


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_is_kept_of_an_update_that_is_not_finite(tmp_path, bad):
    delta = np.zeros(D, np.float32)
    delta[60_001] = bad

    with pytest.raises(NonFiniteUpdateError, match="tensor b"):
        make(tmp_path, the_plan(), work(delta))
    assert list((tmp_path / "uploads").iterdir()) == []


def test_an_infinite_constant_is_refused(tmp_path):
    layout = round_layout(the_plan(), 0, MANIFEST)

    with pytest.raises(NonFiniteUpdateError):
        make(tmp_path, the_plan(), synthetic_work(float("inf"), layout))


def test_an_update_of_another_size_is_refused(tmp_path):
    with pytest.raises(ManifestMismatchError):
        make(tmp_path, the_plan(), work(np.zeros(D - 1, np.float32)))


def test_metrics_are_capped_not_wrapped():
    plan = the_plan()
    huge = work(np.zeros(D, np.float32), tokens=2**60, loss_nats=-3.0, seconds=1e20)

    values = metrics_of(huge, weight=1, plan=plan, index=0, node=plan.roster_ids[0])

    assert values["tokens"] == values["train_ms"] == 2**48 - 1
    assert values["loss_micronats"] == 0  # metrics are not negative


def test_an_evaluation_round_sends_metrics_alone(tmp_path):
    plan = the_plan(rounds=2, evaluation={"languages": ["es"], "final": True})
    local = work(np.empty(0, np.float32), tokens=0)

    record, data = make(tmp_path, plan, local, index=2)

    assert len(data) == round_layout(plan, 2, MANIFEST).packed_size(round_ring(plan)) < 400
    assert verify_header(public_bytes(KEY), record.header, record.signature).coordinates == 66


def test_a_result_is_mapped_not_read(tmp_path):
    path = tmp_path / "delta.f32"
    np.arange(4, dtype="<f4").tofile(path)
    result = Result(
        id="r1.0", steps=1, tokens=2, records=3, loss_nats=4.0, seconds=5.0,
        delta_root="0" * 64, delta_coordinates=4, delta_norm=1.0, device="cpu",
    )  # fmt: skip

    local = work_of_result(result, path)
    assert isinstance(local.delta, np.memmap)
    assert local.delta.tolist() == [0.0, 1.0, 2.0, 3.0]

    with pytest.raises(ManifestMismatchError):
        work_of_result(result.model_copy(update={"delta_coordinates": 5}), path)


# -- models ----------------------------------------------------------------------------------------


@pytest.fixture
def held(tmp_path):
    """Models that hold the first one: theta counts up."""
    plan = the_plan()
    models = Models(tmp_path / "models")
    theta = np.arange(D, dtype="<f4").tobytes()
    scales = scales_of(plan)
    snapshot = Snapshot.initial(MANIFEST, blob_digest(theta), scales)
    folder = models.folder(RunId("r1")) / snapshot.model_root
    folder.mkdir(parents=True)
    (folder / "theta.f32").write_bytes(theta)
    (folder / "scales.bin").write_bytes(scales.to_bytes())
    atomic_write(folder / "snapshot.json", snapshot.to_bytes())
    atomic_write(models.manifest_path(RunId("r1")), MANIFEST.to_bytes())
    return models, plan, models.open(RunId("r1"), snapshot.model_root)


def compute(models, plan, start, data, *, index=0, survivors=1):
    path = models.sum_path(RunId("r1"), blob_digest(data))
    path.write_bytes(data)
    return models.compute_next(
        plan=plan, index=index, start=start, sum_path=path, survivors=survivors, threads=1
    )


def test_the_next_model_is_the_mean_added(tmp_path, held):
    models, plan, start = held
    delta = (np.arange(D, dtype=np.float32) % 5 - 2) / 4096
    _, data = make(tmp_path, plan, work(delta))  # one survivor: its vector is the sum

    following, metrics = compute(models, plan, start, data)

    assert np.array_equal(following.theta(), np.arange(D, dtype=np.float32) + delta)
    assert following.snapshot.round == 1
    assert following.snapshot.theta == blob_digest(following.theta_path.read_bytes())
    assert metrics["tokens"] == 500
    assert models.held(RUN) == {start.snapshot.model_root, following.snapshot.model_root}


def test_computing_again_gives_the_same_model(tmp_path, held):
    models, plan, start = held
    _, data = make(tmp_path, plan, work(np.full(D, 2.0**-12, np.float32)))
    first, _ = compute(models, plan, start, data)

    again, _ = compute(models, plan, start, data)

    assert again.snapshot == first.snapshot
    assert not [path for path in models.folder(RUN).iterdir() if path.name.startswith(".step-")]


def test_a_sum_of_other_survivors_is_an_integrity_failure(tmp_path, held):
    models, plan, start = held
    _, data = make(tmp_path, plan, work(np.zeros(D, np.float32)))

    with pytest.raises(IntegrityError, match="1 nodes, but 2 survived"):
        compute(models, plan, start, data, survivors=2)
    assert models.held(RUN) == {start.snapshot.model_root}


def test_a_sum_of_another_size_is_refused(tmp_path, held):
    models, plan, start = held
    _, data = make(tmp_path, plan, work(np.zeros(D, np.float32)))

    with pytest.raises(CorruptStateError, match="ends before byte"):
        compute(models, plan, start, data[:-1])


def test_a_round_without_tensors_links_the_model(tmp_path, held):
    models, _, start = held
    plan = the_plan(rounds=1, evaluation={"languages": ["es"], "final": True})
    _, data = make(tmp_path, plan, work(np.empty(0, np.float32)), index=1)

    following, _ = compute(models, plan, start, data, index=1)

    assert following.snapshot.theta == start.snapshot.theta
    assert following.theta_path.samefile(start.theta_path)
    assert following.snapshot.model_root != start.snapshot.model_root


def test_what_a_crash_tore_is_dropped_at_start(tmp_path, held):
    models, plan, start = held
    _, data = make(tmp_path, plan, work(np.zeros(D, np.float32)))
    following, _ = compute(models, plan, start, data)
    models.sync(RUN, start.snapshot.model_root)
    with following.theta_path.open("r+b") as file:  # lost by the disk after a power failure
        file.write(bytes(4096))
    with start.theta_path.open("r+b") as file:  # marked as synced: not looked at again
        file.write(b"1234")
    (models.folder(RUN) / ".step-0").mkdir()

    dropped = models.recover()

    assert len(dropped) == 1
    assert following.snapshot.model_root[:12] in dropped[0]
    assert models.held(RUN) == {start.snapshot.model_root}
    assert not (models.folder(RUN) / ".step-0").exists()


def test_what_is_sound_is_kept_at_start(tmp_path, held):
    models, plan, start = held
    _, data = make(tmp_path, plan, work(np.zeros(D, np.float32)))
    following, _ = compute(models, plan, start, data)

    assert models.recover() == []
    assert models.held(RUN) == {start.snapshot.model_root, following.snapshot.model_root}
    assert (following.folder / "synced").exists()


def test_only_the_models_asked_for_are_kept(tmp_path, held):
    models, plan, start = held
    _, data = make(tmp_path, plan, work(np.zeros(D, np.float32)))
    following, _ = compute(models, plan, start, data)
    (models.folder(RUN) / ".fetch-00").mkdir()

    models.keep_only(RUN, frozenset({following.snapshot.model_root}))

    assert models.held(RUN) == {following.snapshot.model_root}
    assert sorted(path.name for path in models.folder(RUN).iterdir()) == sorted(
        ["manifest.json", following.snapshot.model_root]
    )
    with pytest.raises(NotFoundError):
        models.open(RUN, start.snapshot.model_root)


@pytest.mark.parametrize(
    ("mode", "said", "steps", "good"),
    [
        ("record-local", "added", 10, True),
        ("record-local", "later", 10, False),  # its noise would be missing
        ("record-local", "added", 9, False),  # fewer than are charged
        ("record-local", None, 10, False),  # a worker that does not know of privacy
        ("record-distributed", "later", 1, True),
        ("record-distributed", "added", 1, False),
        ("record-distributed", None, 1, False),
    ],
)
def test_a_worker_says_that_it_did_the_private_steps(mode, said, steps, good):
    from types import SimpleNamespace

    from node_agent.contribution import check_private_work
    from protocols.errors import WorkerError
    from tests.support.private_plans import private_plan

    result = SimpleNamespace(steps=steps, private=SimpleNamespace(noise=said) if said else None)
    plan = private_plan(mode)
    check_private_work(plan, plan.rounds, result)  # the round that only evaluates
    if good:
        check_private_work(plan, 0, result)
    else:
        with pytest.raises(WorkerError, match="private steps"):
            check_private_work(plan, 0, result)
