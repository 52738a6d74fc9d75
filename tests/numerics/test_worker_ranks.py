"""Two ranks under torchrun, FSDP2 over gloo, against one process on the union of their batches."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from node_agent.spool import Spool, last_status, read_status, read_worker
from node_agent.worker import checkpoint
from tests.support.base_model import LORA, ask, base_site
from tests.support.training import ALONE, Worker, make_site
from tests.support.worker import ROOT, Site, command, final, wait_for, worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # three torchruns on a busy machine

SGD = {"optimizer": "sgd", "lr": 0.2, "momentum": 0.9, "grad_clip": 0.5, "proximal_mu": 0.3}
SELECTED = ("lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight")


def alone(root: Path, numbers: int, **plan) -> Site:
    """The same jobs done by one process in this one."""
    site = make_site(root, **plan)
    one = Worker(site)
    for number in range(numbers):
        site.ask(number)
    one.answer()
    return site


def moments(site: Site, number: int) -> dict[str, np.ndarray]:
    """What was put away after a round, whole, whoever wrote it."""
    folder = site.spool.state("tiny") / f"{number:06d}"
    boxes = {key: torch.zeros(shape) for key, shape in checkpoint.keys(folder).items()}
    checkpoint.read(folder, boxes, ALONE)
    return {key: box.numpy() for key, box in boxes.items()}


def finished(site: Site, job, process) -> None:
    last = wait_for(lambda: final(site, job), process=process)
    assert last.event == "done", last


def test_two_ranks_do_what_one_process_does(tmp_path):
    """An odd batch (5 over 2 ranks), a short last sequence, padding rows, two rounds, a selection.

    1e-6 is the order of a float32 sum; the updates themselves are 0.1 and more.
    """
    plan = {"documents": 6, "local_step": {**SGD, "batch_size": 5, "max_steps": 4}}
    one = alone(tmp_path / "one", 2, **plan)
    part = make_site(tmp_path / "part", **plan)
    part_job = part.ask(select=SELECTED)
    Worker(part).answer()
    two = make_site(tmp_path / "two", **plan)
    with worker(two.spool, ranks=2) as process:
        info = read_worker(two.spool)
        jobs = [two.ask(number) for number in range(2)]
        for job in jobs:
            finished(two, job, process)
        kept = moments(two, 1)
        timed = two.ask(2, max_seconds=1.0, max_steps=None)
        finished(two, timed, process)

        # A bad job is refused on both ranks alike, and the next one is done.
        poisoned = two.theta
        poisoned[3] = np.nan  # a row that rank 0 holds
        poisoned.tofile(two.root / "bad.f32")
        bad = two.ask(3, theta=str(two.root / "bad.f32"))
        assert wait_for(lambda: final(two, bad), process=process).code == "train.non_finite"
        poisoned = two.theta
        poisoned[-1] = np.nan  # and one that only rank 1 holds
        poisoned.tofile(two.root / "bad.f32")
        bad = two.ask(4, theta=str(two.root / "bad.f32"))
        assert wait_for(lambda: final(two, bad), process=process).code == "train.non_finite"
        missing = two.ask(5, data=two.data.model_copy(update={"train": ("/nowhere",)}))
        assert wait_for(lambda: final(two, missing), process=process).code == "data.missing"

        # Another selection means another sharding; the moments of the other tensors are kept.
        again = two.ask(6, select=SELECTED, reset_optimizer=True)
        finished(two, again, process)
        two.spool.drain.touch()
        assert process.wait(timeout=30) == 0

    assert (info.ranks, info.backend) == (2, "gloo")
    assert read_worker(two.spool) is None
    for job in jobs:
        whole, split = one.result(job), two.result(job)
        np.testing.assert_allclose(two.delta(job), one.delta(job), atol=1e-6, rtol=0)
        assert np.abs(one.delta(job)).max() > 0.01
        assert (split.steps, split.tokens, split.records) == (4, whole.tokens, 20)
        assert split.rank_steps == (4, 4)
        assert split.loss_nats == pytest.approx(whole.loss_nats, rel=1e-6)
        assert split.evaluation[0].nll_nats == pytest.approx(whole.evaluation[0].nll_nats, rel=1e-6)
    alike = moments(one, 1)
    assert kept.keys() == alike.keys()
    assert len(kept) == len(one.manifest.tensors)
    for key, tensor in alike.items():  # 259 rows are 130 and 129; here they are whole again
        np.testing.assert_allclose(kept[key], tensor, atol=1e-6, rtol=0, err_msg=key)
    steps = two.result(timed).rank_steps
    assert steps[0] == steps[1] >= 1  # rank 0's clock decided for both
    assert two.result(again).delta_coordinates == part.result(part_job).delta_coordinates


FINALIZED = """
import atexit, os, pathlib
atexit.register(pathlib.Path(__file__).with_name(f"finalized-{os.getpid()}").touch)
"""


def test_ranks_end_without_the_finalization_in_which_a_thread_of_gloo_may_abort_them(tmp_path):
    """Seen on busy machines: all was done, and torchrun's status was 1 for a rank's SIGABRT."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(FINALIZED)
    spool = Spool(tmp_path / "spool").make()
    with subprocess.Popen(
        command(spool, ranks=2),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{hook}:{ROOT}"},
    ) as torchrun:
        first = wait_for(lambda: read_worker(spool), process=torchrun).pid
        spool.drain.touch()
        said = torchrun.communicate(timeout=60)[1]

    assert torchrun.returncode == 0, said
    assert "worker: leaving: drain" in said
    ended = {int(path.name.partition("-")[2]) for path in hook.glob("finalized-*")}
    assert torchrun.pid in ended  # the hook works: torchrun itself ends as usual
    assert first not in ended
    assert len(ended) == 1


def test_two_ranks_stopped_and_killed_in_the_middle_end_with_the_same_bits(tmp_path):
    """SIGTERM to torchrun, then SIGKILL of one rank in a step: a new torchrun takes the round up.

    Adapters on a bfloat16 base, all of it sharded, activations recomputed, gradients accumulated
    over micro-batches. At the end one process goes on, with the moments of both ranks.
    """
    step = {"optimizer": "adamw", "lr": 3e-3, "max_steps": 12, "batch_size": 4}
    lora = LORA | {"factors": "fedit", "base_dtype": "bfloat16"}
    broken = base_site(tmp_path / "broken", lora=lora, local_step=step)
    whole = base_site(tmp_path / "whole", lora=lora, local_step=step, run="whole")
    whole.spool = broken.spool
    state = broken.spool.state("tiny")
    frugal = ("--micro-batch", "1", "--checkpointing", "on")

    def middle() -> int:
        [folder] = state.glob("000000.step-*")
        return json.loads((folder / "meta.json").read_bytes())["partial"]["progress"]["steps"]

    def until(dies: str, *more: str) -> int:
        """A worker that ends in mid-round: its exit status."""
        with (broken.spool.root / "worker.log").open("ab") as log:
            ended = subprocess.run(
                command(broken.spool, *frugal, *more, ranks=2, module="tests.support.dying_worker"),
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MINGA_TEST_DIES": dies},
                timeout=400,
                check=False,
            )
        return ended.returncode

    job = ask(broken)
    until("0:5:TERM")
    assert last_status(broken.spool, job.id).event == "interrupted"
    assert middle() == 6
    # A checkpoint before every step; the rank dies in the fourth from there, which is lost.
    assert until("1:3:KILL", "--checkpoint-every-s", "1e-9") != 0
    assert middle() == 9
    last = last_status(broken.spool, job.id)
    assert last.event != "failed", last  # it is nobody's fault that could be mended
    with worker(broken.spool, *frugal, ranks=2) as process:
        finished(broken, job, process)
        undisturbed = ask(whole)
        finished(whole, undisturbed, process)

    assert broken.delta(job).tobytes() == whole.delta(undisturbed).tobytes()
    assert np.abs(broken.delta(job)).max() > 1e-3
    assert broken.result(job).loss_nats == whole.result(undisturbed).loss_nats
    assert broken.result(job).steps == 12
    assert not list(state.glob("*.step-*"))  # the middle went when the round was over

    after = ask(broken, 1, max_steps=3)
    one = Worker(broken)
    one.answer()
    assert not any(e.message for e in read_status(broken.spool, after.id) if e.event == "progress")
    metas = [json.loads((state / f"00000{number}/meta.json").read_bytes()) for number in range(2)]
    assert (metas[0]["world"], metas[1]["world"]) == (2, 1)
    assert (metas[1]["epoch"], metas[1]["index"]) > (metas[0]["epoch"], metas[0]["index"])
    assert (metas[0]["updates"], metas[1]["updates"]) == (12, 15)  # its moments were taken over
