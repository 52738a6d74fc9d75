"""Fetching a model: every file checked, resumed after a crash, shared files not fetched twice."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from node_agent import bulk
from node_agent.client import Backoff
from node_agent.models import Models
from protocols.errors import DigestMismatchError, ManifestMismatchError, NotFoundError
from protocols.identifiers import Digest, RoundId
from protocols.plan import Plan
from protocols.round_vector import round_ring
from protocols.tensors.manifest import Manifest, TensorSpec
from protocols.tensors.scales import initial_scales
from protocols.tensors.snapshot import Snapshot
from protocols.tensors.units import blob_digest
from tests.support.node import RUN
from tests.support.node_server import bulk_server
from tests.support.plans import plan_value

D = 1_500_000  # 6 MB: two units
MANIFEST = Manifest((TensorSpec("vector", (D,)),))
PLAN = Plan.from_value(
    plan_value(
        model={"family": "vector", "manifest": MANIFEST.digest, "initial": "0" * 64},
        outer={"optimizer": "nesterov", "momentum": 0.5},
    )
)
THETA = np.arange(D, dtype="<f4").tobytes()
MOMENTUM = np.ones(D, "<f4").tobytes()
SCALES = initial_scales(MANIFEST, PLAN.vector.scale, round_ring(PLAN), 3)
ROUND = RoundId(RUN, 0)
FIRST = Snapshot.initial(MANIFEST, blob_digest(THETA), SCALES)
LATER = Snapshot(
    3,
    MANIFEST.digest,
    blob_digest(THETA),
    {"momentum": blob_digest(MOMENTUM)},
    SCALES.digest,
    {"steps": 3},
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waiting is not what is tested."""
    monkeypatch.setattr(bulk, "Backoff", lambda: Backoff(first_s=0.001, cap_s=0.002))


ALL = (THETA, MOMENTUM, SCALES.to_bytes(), MANIFEST.to_bytes())


def with_server(tmp_path, work, *, blobs=ALL):
    """Run ``work(models, connection, server)`` against a server that has the blobs."""

    async def run():
        async with bulk_server(tmp_path) as served:
            for data in blobs:
                served.server.put(data)
            return await work(Models(tmp_path / "models"), served.connection, served.server)

    return asyncio.run(asyncio.wait_for(run(), 60))


def test_a_model_is_fetched_whole(tmp_path):
    async def work(models, connection, _):
        return await models.obtain(connection, PLAN, LATER, round_=ROUND)

    held = with_server(tmp_path, work)
    assert held.theta().tobytes() == THETA
    assert held.buffers()["momentum"].tobytes() == MOMENTUM
    assert held.scales() == SCALES
    models = Models(tmp_path / "models")
    assert models.held(RUN) == {LATER.model_root}
    assert Plan.from_bytes(models.plan_path(RUN).read_bytes()) == PLAN
    assert Manifest.from_bytes(models.manifest_path(RUN).read_bytes()) == MANIFEST


def test_what_is_held_is_not_fetched_again(tmp_path):
    async def work(models, connection, server):
        await models.obtain(connection, PLAN, FIRST, round_=ROUND)
        models.sync(RUN, FIRST.model_root)
        sent = server.sent
        await models.obtain(connection, PLAN, FIRST, round_=ROUND)
        assert server.sent == sent
        later = await models.obtain(connection, PLAN, LATER, round_=ROUND)
        return later, server.sent - sent

    later, more = with_server(tmp_path, work)
    assert more == len(MOMENTUM)  # theta and scales are those of the first model
    assert later.theta().tobytes() == THETA


def test_a_fetch_goes_on_where_a_crash_left_it(tmp_path):
    """theta is whole, momentum lacks its second unit, scales are missing."""
    folder = tmp_path / "models" / RUN / f".fetch-{LATER.model_root}"
    folder.mkdir(parents=True)
    (folder / "theta.f32").write_bytes(THETA)
    (folder / ".momentum.f32.part").write_bytes(MOMENTUM[: 4 * 2**20 + 17])

    async def work(models, connection, server):
        await models.obtain(connection, PLAN, LATER, round_=ROUND)
        return server.sent

    rest = len(MOMENTUM) - 4 * 2**20
    assert with_server(tmp_path, work) == rest + len(SCALES) + len(MANIFEST.to_bytes())


def test_a_model_of_another_manifest_is_refused_before_a_byte(tmp_path):
    other = Snapshot(0, Digest("1" * 64), FIRST.theta, {}, FIRST.scales, {"steps": 0})

    async def work(models, connection, server):
        with pytest.raises(ManifestMismatchError):
            await models.obtain(connection, PLAN, other, round_=ROUND)
        return server.sent

    assert with_server(tmp_path, work) == 0


def test_a_theta_of_another_size_is_refused(tmp_path):
    short = THETA[:-4]
    wrong = Snapshot(0, MANIFEST.digest, blob_digest(short), {}, FIRST.scales, {"steps": 0})

    async def work(models, connection, _):
        with pytest.raises(DigestMismatchError, match="it must have 6000000"):
            await models.obtain(connection, PLAN, wrong, round_=ROUND)
        return models.held(RUN)

    blobs = (short, SCALES.to_bytes(), MANIFEST.to_bytes())
    assert with_server(tmp_path, work, blobs=blobs) == frozenset()


def test_a_missing_blob_leaves_nothing_that_counts(tmp_path):
    async def work(models, connection, _):
        with pytest.raises(NotFoundError):
            await models.obtain(connection, PLAN, LATER, round_=ROUND)
        return models.held(RUN)

    blobs = (THETA, SCALES.to_bytes(), MANIFEST.to_bytes())
    assert with_server(tmp_path, work, blobs=blobs) == frozenset()
