"""Private steps on two ranks (gloo): the same sums as one process; wrong ways are convicted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from node_agent.spool import last_status
from node_agent.worker import private_step
from tests.support.base_model import LORA, ask, base_site
from tests.support.private_ranks import SELECTED
from tests.support.private_worker import counted_bytes, plain_dpsgd, private_site, without_noise
from tests.support.training import Worker
from tests.support.worker import ROOT, Site

pytestmark = pytest.mark.slow
torch.set_num_threads(1)

STEPS = {"steps": 3}
MOMENTUM = {"momentum": 0.9}


ADAPTERS: dict[str, Site] = {}


def adapter_sites(root: Path) -> dict[str, Site]:
    """Plans that train adapters, in clear and privately."""
    step = {"optimizer": "sgd", "lr": 0.5, "batch_size": 5, "max_steps": 3}
    privacy = STEPS | {"clip_norm": 0.02}
    both = LORA | {"factors": "fedit"}
    return {
        "plain": base_site(root / "plain", lora=both, local_step=step),
        "private": base_site(root / "private", lora=LORA, private=True, privacy=privacy),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Jobs done, and figures measured, by one torchrun of two ranks."""
    root = tmp_path_factory.mktemp("ranks")
    site = private_site(root, privacy=STEPS, local_step=MOMENTUM)
    whole, part = site.ask(0), site.ask(1, select=SELECTED, reset_optimizer=True)
    for name, made in adapter_sites(root).items():
        made.extra["job"] = ask(made)
        ADAPTERS[name] = made
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "--max-restarts", "0"),
            *("-m", "tests.support.private_ranks", str(root)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((root / "figures.json").read_text())
    return site, whole, part, figures


def test_two_ranks_do_what_a_plain_loop_does(two_ranks):
    """All tensors trained and whole on both ranks."""
    site, job, _, _ = two_ranks
    assert last_status(site.spool, job.id).event == "done"
    wanted = plain_dpsgd(site, counted_bytes())

    assert np.abs(wanted).max() > 1e-2
    np.testing.assert_allclose(site.delta(job), wanted, atol=1e-6, rtol=0)
    result = site.result(job)
    assert result.rank_steps == (3, 3)
    assert result.private.way == "loop"


def test_two_ranks_with_a_sharded_base_do_what_one_process_does(two_ranks, tmp_path, monkeypatch):
    """Two tensors trained, the rest frozen and sharded; ranks with unequal numbers of rows."""
    site, _, job, figures = two_ranks
    assert figures["ours sharded"]  # else the base would be whole on both
    monkeypatch.setattr(private_step, "noised", without_noise)
    one = private_site(tmp_path, privacy=STEPS, local_step=MOMENTUM)
    source = counted_bytes()
    for _ in range(3 * 3):
        source(32)  # what the first job of the two ranks used
    alone = one.ask(1, select=SELECTED, reset_optimizer=True)
    Worker(one, random_bytes=source, private_way="loop").answer()

    assert np.abs(one.delta(alone)).max() > 1e-2
    np.testing.assert_allclose(site.delta(job), one.delta(alone), atol=1e-6, rtol=0)
    assert site.result(job).private == one.result(alone).private


def test_no_record_moves_the_sum_of_two_ranks_further_than_the_clip_norm(two_ranks):
    assert two_ranks[3]["ours"] <= 1 + 1e-6


def test_clipping_after_the_gradients_were_scattered_is_convicted(two_ranks):
    assert two_ranks[3]["clip after scatter"] > 1.1


def test_ghost_clipping_on_sharded_data_is_convicted(two_ranks):
    """A step that is as many times too long as there are ranks."""
    assert two_ranks[3]["ghost"] > 1.5


@pytest.mark.parametrize("name", ["plain", "private"])
def test_two_ranks_train_adapters_as_one_process_does(two_ranks, tmp_path, monkeypatch, name):
    """FSDP2 shards base and adapters; in private steps the base alone."""
    monkeypatch.setattr(private_step, "noised", without_noise)
    two, one = ADAPTERS[name], adapter_sites(tmp_path)[name]
    alone = ask(one)
    Worker(one, random_bytes=counted_bytes()).answer()
    job = two.extra["job"]
    assert last_status(two.spool, job.id).event == "done"

    assert np.abs(one.delta(alone)).max() > 1e-3
    np.testing.assert_allclose(two.delta(job), one.delta(alone), atol=1e-6, rtol=0)
    assert two.result(job).rank_steps == (3, 3)
