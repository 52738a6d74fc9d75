"""Making a federation's folder for each setting: keys, enrolment and submission, once a process."""

from __future__ import annotations

import asyncio
import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import grpc
import numpy as np

from coordinator import setup
from coordinator.blobs import Blobs
from coordinator.clock import ManualClock
from infra.runs.operator import find_operator
from node_agent import config as node_config
from node_agent.config import BudgetConfig, DataConfig, PrivacyConfig, WorkerConfig
from node_agent.enrol import join
from node_agent.journal import Journal
from node_agent.keys import KeyStore
from node_agent.log import LogPaths
from node_agent.privacy_ledger import PrivacyLedger
from protocols.enrolment import Invitation
from protocols.gen import admin_pb2, admin_pb2_grpc
from protocols.identifiers import FederationId, NodeId
from protocols.plan import Plan
from protocols.round_vector import round_ring
from protocols.tensors.scales import initial_scales
from protocols.tensors.snapshot import Snapshot
from tests.simulation.engine import EPOCH
from tests.simulation.trainer import EXPONENT
from tests.simulation.world import ADDRESS, ENROLMENT, MANIFEST, RUN, Node, Setting, World, alive

JOIN, TRAIN, SHORT, UPLOAD = 8, 12, 8, 10  # seconds: deadlines of the plan
COORDINATES = MANIFEST.coordinates
MODES = {"open": "open", "masked": "aggregate-only", "private": "record-local"}


def plan_value(setting: Setting, keys: dict[str, str], initial: str) -> dict[str, Any]:
    """The plan of a setting as a JSON value."""
    masked = setting.masked
    value: dict[str, Any] = {
        "federation": "sim",
        "run": RUN,
        "mode": MODES[setting.mode],
        "roster": list(setting.names),
        "min_participants": 3 if masked else 2,
        "rounds": setting.rounds,
        "model": {"family": "vector", "manifest": MANIFEST.digest, "initial": initial},
        "local_step": {"kind": "builtin", "max_steps": 2},
        "vector": {"ring_bits": 20, "scale": {"mode": "fixed", "exponent": EXPONENT}},
        "deadlines": {
            "join": JOIN, "train": TRAIN, "deal": SHORT, "upload": UPLOAD,
            "commit": SHORT, "reveal": SHORT,
        },
    }  # fmt: skip
    if masked:
        value["secagg"] = {"threshold": 3, "colluders": 1, "min_surviving": 3, "keys": keys}
    if setting.mode == "private":
        value["local_step"] |= {"keep_optimizer": False}
        value["privacy"] = {
            "unit": "document",
            "max_sequences": 4,
            "clip_norm": 1.0,
            "noise_multiplier": 1.0,
            "sampling_rate": 0.05,
            "expected_batch": 16.0,
            "steps": 2,
            "delta": "1e-5",
        }
    return value


def in_memory() -> Path | None:
    """A folder in memory, where there is one: simulations sync thousands of times."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else None


@cache
def template(setting: Setting) -> Path:
    """A federation whose run has been submitted, and nothing else; made once in a process."""
    folder = Path(tempfile.mkdtemp(prefix="minga-sim-", dir=in_memory()))
    atexit.register(partial(shutil.rmtree, folder, ignore_errors=True))
    before = EPOCH - timedelta(minutes=1)
    with mock.patch.object(setup, "SystemClock", partial(ManualClock, before)):
        setup.initialise(
            folder=folder,
            federation="sim",
            address=ADDRESS,
            enrolment=ENROLMENT,
            public=ADDRESS,
            hosts=(),
            ledger="sqlite:///ledger.sqlite",
            operator="cenia",
            log=setting.log,
            now=before,
        )
    for name in setting.names:
        (folder / "nodes" / name).mkdir(parents=True)
    world = World(folder, setting, 0, jitter=0.0)
    with alive(world):
        world.coordinator.start()
        process = world.coordinator.process
        assert process is not None
        task = process.spawn(_enrol_and_submit(world))
        world.loop.run_until_complete(task)
    return folder


async def _enrol_and_submit(world: World) -> None:
    await asyncio.sleep(1.0)
    operator = find_operator(folder=world.folder, config=None, environment={})
    channel = grpc.aio.secure_channel(
        ADDRESS, grpc.ssl_channel_credentials(operator.ca, operator.key, operator.certificate)
    )
    admin: Any = admin_pb2_grpc.AdminStub(channel)
    keys = {}
    for name, node in world.nodes.items():
        invited = await admin.Invite(admin_pb2.InviteRequest(institution=name, valid_hours=1))
        store = KeyStore(node.folder.make().keys)
        await join(
            store,
            Invitation.parse(invited.token),
            enrolment=ENROLMENT,
            rng=Random(1),
            log=LogPaths(node.folder.root) if world.setting.log else None,
        )
        keys[name] = store.signing_key().public_key().public_bytes_raw().hex()
        _write_config(node)
        Journal(node.folder.journal, now=lambda: EPOCH).close()
        PrivacyLedger(node.folder.privacy, now=lambda: EPOCH).close()
    plan, snapshot = _initial(world, keys)
    request = operator.sign_request(plan, EPOCH)
    body, signature = request or (b"", b"")
    await admin.SubmitRun(
        admin_pb2.SubmitRunRequest(
            plan=plan.to_bytes(),
            snapshot=snapshot.to_bytes(),
            request=body,
            request_signature=signature,
        )
    )


def _write_config(node: Node) -> None:
    text = node.folder.root / "text.jsonl"
    text.write_text('{"text": "uno"}\n')
    node.folder.config.write_text(
        node_config.render_config(
            institution=NodeId(node.name),
            federation=FederationId("sim"),
            coordinator=ADDRESS,
            enrolment=ENROLMENT,
            data=DataConfig(train=("text.jsonl",)),
            worker=WorkerConfig(device="cpu"),
            privacy=PrivacyConfig(budget=(BudgetConfig(epsilon=50.0, delta=1e-3),)),
        )
    )


def _initial(world: World, keys: dict[str, str]) -> tuple[Plan, Snapshot]:
    draft = Plan.from_value(plan_value(world.setting, keys, "0" * 64))
    ring, nodes = round_ring(draft), world.setting.nodes
    scales = initial_scales(MANIFEST, draft.vector.scale, ring, nodes)
    blobs = Blobs(world.coordinator.config.blobs)
    blobs.prepare()
    theta = blobs.put_bytes(np.zeros(COORDINATES, "<f4").tobytes())
    blobs.put_bytes(MANIFEST.to_bytes())
    blobs.put_bytes(scales.to_bytes())
    snapshot = Snapshot.initial(MANIFEST, theta, scales)
    return Plan.from_value(plan_value(world.setting, keys, snapshot.model_root)), snapshot


@contextmanager
def world_of(setting: Setting, seed: int, *, jitter: float = 0.0) -> Iterator[World]:
    """A living federation on a fresh copy of its setting's folder."""
    made = template(setting)
    with tempfile.TemporaryDirectory(prefix="minga-sim-", dir=in_memory()) as name:
        folder = Path(name) / "f"
        shutil.copytree(made, folder)
        with alive(World(folder, setting, seed, jitter=jitter)) as world:
            yield world
