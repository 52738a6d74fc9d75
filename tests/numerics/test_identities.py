"""Identities that most mistakes break: a federation of one, and a federation of single steps.

The worker trains a real tiny Llama; the update goes the whole way as integers, through the packed
sum and the outer step, and is compared with training that knows nothing of any of it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from protocols.outer_step import apply_outer_step
from protocols.plan import Outer, Scale
from protocols.tensors.encode import encode_vector
from protocols.tensors.layout import VectorLayout
from protocols.tensors.metrics import metric_names
from protocols.tensors.planar import accumulate
from protocols.tensors.ring import Ring
from protocols.tensors.scales import initial_scales
from protocols.tensors.sizes import WEIGHT_ONE
from tests.numerics.test_worker_training import sequences
from tests.support.training import Worker, flat, make_site, reference_model, train_reference
from tests.support.worker import Site, write_text

torch.set_num_threads(1)
RING = Ring(24)
RULE = Scale(first_bound=0.5)


def train(tmp_path, name: str, *, text_seed: int, **local: object) -> tuple[Site, np.ndarray]:
    """One site's local step: the site and its update."""
    site = make_site(tmp_path / name, local_step=local)
    write_text(site.root / "train.jsonl", documents=40, seed=text_seed)
    job = site.ask(0)
    Worker(site).answer()
    assert site.result(job) is not None
    return site, site.delta(job)


def federate(
    site: Site, deltas: list[np.ndarray], layout: VectorLayout | None = None
) -> tuple[np.ndarray, float]:
    """The next model by the coordinator's own path, and the ring's step."""
    layout = layout or VectorLayout.of(site.manifest, "all", metric_names(()))
    scales = initial_scales(site.manifest, RULE, RING, len(deltas))
    vectors = []
    for number, delta in enumerate(deltas):
        parts: list[bytes] = []
        encode_vector(
            delta,
            layout,
            scales,
            weight_units=WEIGHT_ONE,
            clip_factor=1.0,
            metrics=dict.fromkeys(layout.metrics, 0) | {"weight": WEIGHT_ONE, "nodes": 1},
            seed=bytes([number]) * 32,
            ring=RING,
            limit=RING.clamp_limit(len(deltas)),
            sink=parts.append,
        )
        vectors.append(b"".join(parts))
    readers = [lambda offset, length, v=v: v[offset : offset + length] for v in vectors]
    theta = np.zeros_like(site.theta)

    def keep(name: str, offset: int, data: memoryview) -> None:
        theta.view(np.uint8)[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    apply_outer_step(
        outer=Outer(optimizer="average", lr=1.0),
        scale_rule=RULE,
        layout=layout,
        manifest=site.manifest,
        snapshot_counters={"steps": 0},
        theta=site.theta,
        buffers={},
        scales=scales,
        sum_reader=b"".join(accumulate(readers, layout, RING)),
        ring=RING,
        nodes=len(deltas),
        roster=len(deltas),
        writer=keep,
    )
    return theta, float(2.0 ** -int(scales.exponents.min()))


def test_one_site_is_local_training(tmp_path):
    """Rate 1 and no momentum: the next model is the site's own, to one step of the ring."""
    site, delta = train(
        tmp_path, "a", text_seed=1, optimizer="adamw", lr=3e-3, max_steps=5, batch_size=4
    )
    theta, step = federate(site, [delta])
    assert np.abs(delta).max() > 1e-3  # else nothing was tested
    assert step < 1e-6
    np.testing.assert_allclose(theta, site.theta + delta, rtol=0, atol=1.01 * step)


@pytest.mark.parametrize("planted", [False, True])
def test_single_sgd_steps_are_centralised_sgd(tmp_path, planted):
    """One SGD step a round, equal weights: the same as one step on everybody's batch together.

    With one site left out of the union the identity must fail: the comparison can convict.
    """
    local = {"optimizer": "sgd", "lr": 0.2, "max_steps": 1, "batch_size": 4}
    sites, deltas = [], []
    for number in range(3):
        site, delta = train(tmp_path, f"s{number}", text_seed=10 + number, **local)
        sites.append(site)
        deltas.append(delta)
    theta, _ = federate(sites[0], deltas)

    union = [tokens for site in sites for tokens in sequences(site, seed=3, count=4)]
    if planted:
        union = union[:8]
    model = reference_model(sites[0].theta, sites[0].manifest)
    train_reference(model, [union], make=lambda p: torch.optim.SGD(p, lr=0.2), lr_at=lambda _: 0.2)
    difference = np.abs(theta - flat(model)).max()
    assert np.abs(flat(model) - sites[0].theta).max() > 1e-3
    assert (difference > 1e-5) if planted else (difference < 1e-6)
