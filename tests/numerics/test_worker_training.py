"""The local step against independent arithmetic, and against itself after every kind of restart."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from node_agent.resident import Clock, JobFailedError
from node_agent.spool import (
    forget_job,
    last_status,
    read_status,
    request_cancel,
    request_finish,
)
from node_agent.worker import state
from node_agent.worker.data import epoch_order, index_corpus
from node_agent.worker.optimizer import InnerOptimizer
from tests.support.training import (
    StopAfter,
    Worker,
    flat,
    make_site,
    reference_model,
    reference_nll,
    train_reference,
)
from tests.support.worker import TINY, Site, events, write_text

torch.set_num_threads(1)
PART = "__0_0.distcp"  # of a state: what rank 0 holds


def sequences(site: Site, *, seed: int, count: int) -> list[list[int]]:
    """The site's first training sequences, unpadded, computed without the worker's packing."""
    lines = Path(site.data.train[0]).read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    length = site.plan.local_step.sequence_length
    found: list[list[int]] = []
    epoch = 0
    while len(found) < count:
        order = epoch_order(len(texts), seed=seed, epoch=epoch)
        stream = [t for i in order for t in (256, *texts[i].encode(), 257)]
        starts = range(0, len(stream) - 1, length)
        found += [stream[start : start + length + 1] for start in starts]
        epoch += 1
    return found[:count]


def batched(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def follow(site: Site, delta: np.ndarray) -> None:
    """The next round starts where this site ended."""
    (site.theta + delta).astype("<f4").tofile(site.root / "theta.f32")


# -- one job against independent arithmetic ------------------------------------------------------


OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "lr": 0.2},
    "sgd, momentum, decay, clip": {
        "optimizer": "sgd",
        "lr": 0.2,
        "momentum": 0.9,
        "weight_decay": 0.01,
        "grad_clip": 0.5,
    },
    "adamw, decay, warm-up": {
        "optimizer": "adamw",
        "lr": 3e-3,
        "betas": [0.9, 0.99],
        "weight_decay": 0.1,
        "warmup_steps": 4,
    },
    "adamw, proximal, clip": {
        "optimizer": "adamw",
        "lr": 3e-3,
        "proximal_mu": 0.5,
        "grad_clip": 1.0,
    },
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_matches_an_independent_loop(tmp_path, name):
    """Six documents make 17 sequences of 32: seven steps of 4 cross the epoch's short last one."""
    options = OPTIMIZERS[name]
    site = make_site(tmp_path, documents=6, local_step=dict(max_steps=7, **options))
    job = site.ask()
    Worker(site).answer()
    result, step = site.result(job), site.plan.local_step
    batches = batched(sequences(site, seed=job.seed, count=28), 4)
    assert any(len(tokens) < 33 for batch in batches for tokens in batch)  # padding was met

    model = reference_model(site.theta, site.manifest)

    def make(parameters):
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": step.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        if step.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=step.lr, betas=step.betas, foreach=False)
        return torch.optim.SGD(groups, lr=step.lr, momentum=step.momentum, foreach=False)

    loss = train_reference(
        model,
        batches,
        make=make,
        lr_at=lambda number: step.lr * min(1.0, (number + 1) / max(1, step.warmup_steps)),
        clip=step.grad_clip,
        mu=step.proximal_mu,
    )
    wanted = flat(model) - site.theta

    # AdamW divides by the root of a tiny second moment, which magnifies rounding; SGD does not.
    tolerance = 2e-6 if step.optimizer == "sgd" else 2e-4
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(site.delta(job), wanted, atol=tolerance, rtol=0)
    assert (result.steps, result.records) == (7, 28)
    assert result.tokens == sum(len(tokens) - 1 for batch in batches for tokens in batch)
    assert result.loss_nats == pytest.approx(loss, rel=1e-5)
    assert result.delta_norm == pytest.approx(float(np.linalg.norm(wanted)), rel=1e-4)


@pytest.mark.parametrize("change", ["momentum", "grad_clip", "warmup_steps", "proximal_mu"])
def test_the_comparison_notices_each_part_of_the_optimizer(tmp_path, change):
    """A part that did nothing would pass the test above by accident."""
    base = {"optimizer": "sgd", "lr": 0.2, "max_steps": 7}
    changed = {"momentum": 0.9, "grad_clip": 0.5, "warmup_steps": 4, "proximal_mu": 0.5}
    plain, other = (
        make_site(tmp_path / name, documents=6, local_step=base | more)
        for name, more in (("plain", {}), ("other", {change: changed[change]}))
    )
    deltas = []
    for site in (plain, other):
        job = site.ask()
        Worker(site).answer()
        deltas.append(site.delta(job))

    assert np.abs(deltas[0] - deltas[1]).max() > 1e-4


@pytest.mark.parametrize("rows", [1, 3])
def test_micro_batches_change_memory_and_not_the_update(tmp_path, rows):
    whole = make_site(tmp_path / "whole", documents=6)
    parts = make_site(tmp_path / "parts", documents=6)
    job = whole.ask()
    parts.ask()
    Worker(whole).answer()
    Worker(parts, micro_batch=rows).answer()

    np.testing.assert_allclose(parts.delta(job), whole.delta(job), atol=1e-6, rtol=0)
    assert parts.result(job).tokens == whole.result(job).tokens


def test_recomputed_activations_change_memory_and_not_the_update(tmp_path):
    plain, recomputed = make_site(tmp_path / "plain"), make_site(tmp_path / "recomputed")
    job = plain.ask()
    recomputed.ask()
    Worker(plain).answer()
    Worker(recomputed, checkpointing=True).answer()

    assert recomputed.delta(job).tobytes() == plain.delta(job).tobytes()


def test_only_the_selected_tensors_move_and_leave(tmp_path):
    site = make_site(tmp_path)
    names = ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight")
    job = site.ask(select=names)
    Worker(site).answer()

    segments = site.manifest.select(names)
    assert site.result(job).delta_coordinates == sum(s.stop - s.start for s in segments)
    # Manifest order, not the order asked: q_proj comes first. Against one hand-made step:
    everything = make_site(tmp_path / "all", local_step={"max_steps": 1})
    one = site.ask(1, select=names, max_steps=1, reset_optimizer=True)
    shutil.rmtree(site.spool.state("tiny"))
    Worker(site).answer()
    whole = everything.ask()
    Worker(everything).answer()
    picked = np.concatenate([everything.delta(whole)[s.start : s.stop] for s in segments])
    np.testing.assert_allclose(site.delta(one), picked, atol=1e-7, rtol=0)


def test_the_same_job_gives_the_same_bits(tmp_path):
    first, second = make_site(tmp_path / "a"), make_site(tmp_path / "b")
    for site in (first, second):
        job = site.ask()
        Worker(site).answer()

    assert first.delta(job).tobytes() == second.delta(job).tobytes()
    assert first.result(job).loss_nats == second.result(job).loss_nats


# -- evaluation ----------------------------------------------------------------------------------


def test_evaluation_matches_one_document_at_a_time(tmp_path):
    site = make_site(tmp_path, local_step={"sequence_length": 16})
    folder = tmp_path / "valid"
    write_text(folder / "es.jsonl", documents=5, seed=3, lang="es")
    write_text(folder / "pt.jsonl", documents=4, seed=4, lang="pt")
    write_text(folder / "none.jsonl", documents=3, seed=5)
    data = site.data.model_copy(update={"valid": (str(folder),)})
    job = site.ask(data=data)
    Worker(site).answer()
    model = reference_model(site.theta, site.manifest)

    wanted: dict[str, list[float]] = {}
    for file, language in (("es", "es"), ("pt", "pt"), ("none", "und")):
        for line in (folder / f"{file}.jsonl").read_text("utf-8").splitlines():
            text = json.loads(line)["text"].encode()
            tokens = [256, *text]
            row = wanted.setdefault(language, [0.0, 0, 0])
            for start in range(0, len(text), 16):  # windows of 16 predicted bytes
                row[0] += reference_nll(model, tokens[start : start + 17]).item()
            row[1] += len(text)
            row[2] += 1

    rows = site.result(job).evaluation
    assert [row.language for row in rows] == ["es", "pt", "und"]
    for row in rows:
        nll, size, documents = wanted[row.language]
        assert (row.bytes, row.documents) == (size, documents)
        assert row.nll_nats == pytest.approx(nll, rel=1e-5)


def test_the_starting_model_is_evaluated_not_the_trained_one(tmp_path):
    site = make_site(tmp_path, local_step={"max_steps": 30})
    first = site.ask(0)
    Worker(site).answer()
    follow(site, site.delta(first))
    second = site.ask(1, select="none")
    Worker(site).answer()

    before, after = (site.result(job).evaluation[0].nll_nats for job in (first, second))
    untrained = site.result(first).evaluation[0].bytes * math.log(259)
    assert before == pytest.approx(untrained, rel=0.05)  # knows nothing yet
    assert after < 0.8 * before


def test_an_evaluation_only_round_sends_an_empty_update_and_keeps_the_state(tmp_path):
    site = make_site(tmp_path)
    worker = Worker(site)
    site.ask(0)
    worker.answer()
    job = site.ask(1, select="none", data=site.data.model_copy(update={"train": ()}))
    worker.answer()

    result = site.result(job)
    assert (result.delta_coordinates, result.steps, result.tokens) == (0, 0, 0)
    assert result.evaluation[0].documents == 6
    assert [p.name for p in site.spool.state("tiny").iterdir()] == ["000000"]


def test_rounds_are_evaluated_as_the_plan_says(tmp_path):
    site = make_site(tmp_path, evaluation={"every": 2, "max_documents": 3})
    worker = Worker(site)
    for number in range(3):
        site.ask(number)
    worker.answer()

    rows = [site.result(site.job(number)).evaluation for number in range(3)]
    assert [bool(row) for row in rows] == [True, False, True]
    assert rows[0][0].documents == 3
    assert "evaluated" in events(read_status(site.spool, "tiny.0"))
    assert "evaluated" not in events(read_status(site.spool, "tiny.1"))


def test_the_index_decides_not_the_number(tmp_path):
    """After a round that came to nothing the next number has the same index in the plan."""
    site = make_site(tmp_path, evaluation={"every": 2, "max_documents": 3})
    worker = Worker(site)
    site.ask(1, index=0)
    site.ask(2, index=1)
    worker.answer()
    rows = [
        site.result(site.job(number, index=index)).evaluation for number, index in ((1, 0), (2, 1))
    ]
    assert [bool(row) for row in rows] == [True, False]


# -- memory between rounds -----------------------------------------------------------------------


ADAM = {"optimizer": "adamw", "lr": 5e-3, "warmup_steps": 6, "max_steps": 5, "proximal_mu": 0.1}


def three_rounds(site: Site, *, restart: bool) -> list[bytes]:
    """The updates of rounds 0 to 2, each starting from the model the last one ended with."""
    worker, deltas = Worker(site), []
    for number in range(3):
        job = site.ask(number)
        if restart:
            worker = Worker(site)
        worker.answer()
        deltas.append(site.delta(job).tobytes())
        follow(site, site.delta(job))
    return deltas


def test_a_restart_between_rounds_changes_no_bit(tmp_path):
    kept = three_rounds(make_site(tmp_path / "kept", local_step=ADAM), restart=False)
    restarted = three_rounds(make_site(tmp_path / "restarted", local_step=ADAM), restart=True)

    assert restarted == kept


def test_what_is_kept_matters(tmp_path):
    """Else the test above would hold for a worker that forgets everything each round."""
    site = make_site(tmp_path / "kept", local_step=ADAM)
    kept = three_rounds(site, restart=False)
    for name, forget in (
        ("plan", {"keep_optimizer": False}),
        ("state", {}),
    ):
        other = make_site(tmp_path / name, local_step=ADAM | forget)
        deltas = []
        for number in range(2):
            job = other.ask(number)
            Worker(other).answer()
            deltas.append(other.delta(job).tobytes())
            follow(other, other.delta(job))
            if name == "state":
                shutil.rmtree(other.spool.state("tiny"))
        assert deltas[0] == kept[0], name
        assert deltas[1] != kept[1], name


def test_a_reset_forgets_the_moments_and_not_the_place_in_the_data(tmp_path):
    """With SGD and no momentum there is nothing to reset: only the data could differ."""
    plain, reset = make_site(tmp_path / "plain"), make_site(tmp_path / "reset")
    for site, again in ((plain, False), (reset, True)):
        for number in range(2):
            job = site.ask(number, reset_optimizer=again)
            Worker(site).answer()
    assert reset.delta(job).tobytes() == plain.delta(job).tobytes()

    adam = [make_site(tmp_path / f"adam{i}", local_step=ADAM) for i in range(2)]
    for site, again in zip(adam, (False, True), strict=True):
        for number in range(2):
            job = site.ask(number, reset_optimizer=again)
            Worker(site).answer()
    assert adam[0].delta(job).tobytes() != adam[1].delta(job).tobytes()


@pytest.mark.parametrize("at", [0, 1, 5, 9])
def test_an_interrupted_round_ends_with_the_same_bits(tmp_path, at):
    """Told to leave after 0 to 9 questions: in the evaluation, before its 1st, 5th, 9th step."""
    step = ADAM | {"max_steps": 9}
    whole, broken = (make_site(tmp_path / name, local_step=step) for name in ("whole", "broken"))
    for site in (whole, broken):
        for number in range(2):
            job = site.ask(number)
            if site is broken and number == 1:
                stop = StopAfter(site, at + 2)  # serve and the job's start each ask once
                Worker(site).answer(stop=stop)
                assert stop.fired
                assert events(read_status(site.spool, job.id))[-1] == "interrupted"
                assert not site.spool.result(job.id).exists()
            Worker(site).answer()
            if number == 0:
                follow(site, site.delta(job))

    assert broken.delta(job).tobytes() == whole.delta(job).tobytes()
    one, other = whole.result(job), broken.result(job)
    clockless = {"seconds": 0.0, "spent": None}
    assert other.model_copy(update=clockless) == one.model_copy(update=clockless)
    assert sorted(p.name for p in broken.spool.state("tiny").iterdir()) == ["000000", "000001"]


def test_late_work_is_added_to_the_update(tmp_path):
    """In float32, coordinate by coordinate; of a selection as of all tensors."""
    rng = np.random.default_rng(5)
    for select in ("all", ("lm_head.weight", "model.layers.1.mlp.up_proj.weight")):
        site = make_site(tmp_path / str(len(select)), local_step=ADAM)
        alone = site.ask(select=select)
        Worker(site).answer()
        own = site.delta(alone)
        late = [rng.normal(size=own.size).astype("<f4") for _ in range(2)]
        for number, one in enumerate(late):
            one.tofile(site.root / f"late-{number}.f32")
        shutil.rmtree(site.spool.state("tiny"))
        paths = tuple(str(site.root / f"late-{number}.f32") for number in range(2))
        job = site.ask(select=select, carry=paths)
        Worker(site).answer()

        assert site.delta(job).tobytes() == ((own + late[0]) + late[1]).tobytes()
        assert site.result(job).delta_norm == pytest.approx(np.linalg.norm(site.delta(job)))


@pytest.mark.parametrize("what", ["short", "gone"])
def test_late_work_that_does_not_fit_is_refused(tmp_path, what):
    site = make_site(tmp_path, local_step=ADAM)
    if what == "short":
        np.zeros(3, dtype="<f4").tofile(site.root / "late.f32")
    job = site.ask(carry=(str(site.root / "late.f32"),))
    Worker(site).answer()

    last = last_status(site.spool, job.id)
    assert (last.event, last.code) == ("failed", "job.carry" if what == "short" else "storage")
    assert not site.spool.result(job.id).exists()


def test_the_middle_of_a_round_is_taken_up_and_not_begun_again(tmp_path):
    site = make_site(tmp_path, local_step=ADAM | {"max_steps": 9})
    site.ask()
    Worker(site).answer(stop=StopAfter(site, 8))
    [middle] = site.spool.state("tiny").iterdir()

    done = json.loads((middle / "meta.json").read_bytes())["partial"]["progress"]["steps"]
    assert 0 < done < 9
    assert middle.name == f"000000.step-{done:09d}"
    ticks = iter(range(10**6))
    Worker(site, clock=Clock(monotonic=lambda: float(next(ticks)))).answer()
    steps = [e.step for e in read_status(site.spool, "tiny.0") if e.event == "progress"]
    assert steps[0] > done  # a clock that ticks a second per look makes it speak at every step


class Killed(BaseException):
    """What no handler catches: the process is gone."""


def killed_after(steps: int, monkeypatch) -> None:
    """The optimizer dies in the middle of a step."""
    real, left = InnerOptimizer.apply, [steps]

    def apply(self):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        real(self)

    monkeypatch.setattr(InnerOptimizer, "apply", apply)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd, proximal"])
@pytest.mark.parametrize("at", [1, 4, 8])
def test_a_killed_worker_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch, at, optimizer):
    """A checkpoint before every step; killed in a step, it loses that step and ends alike."""
    step = ADAM if optimizer == "adamw" else OPTIMIZERS["sgd, momentum, decay, clip"]
    step = step | {"max_steps": 9, "proximal_mu": 0.0 if optimizer == "adamw" else 0.5}
    whole, broken = (make_site(tmp_path / name, local_step=step) for name in ("whole", "broken"))
    for site in (whole, broken):
        job = site.ask()
    Worker(whole).answer()
    with monkeypatch.context() as patch:
        killed_after(at, patch)
        with pytest.raises(Killed):
            Worker(broken, put_away_every_s=0.0).answer()
    assert [path.name for path in broken.spool.state("tiny").iterdir()] == [
        f"000000.step-{at:09d}"  # older ones are gone
    ]
    with monkeypatch.context() as patch:
        killed_after(9 - at, patch)  # one step more would be one too many
        Worker(broken).answer()

    assert broken.delta(job).tobytes() == whole.delta(job).tobytes()
    clockless = {"seconds": 0.0, "spent": None, "rank_steps": (9,)}
    one, other = whole.result(job), broken.result(job)
    assert other.model_copy(update=clockless) == one.model_copy(update=clockless)
    assert [path.name for path in broken.spool.state("tiny").iterdir()] == ["000000"]


@pytest.mark.parametrize("moment", ["before its name", "after its name"])
def test_killed_while_a_checkpoint_is_written(tmp_path, monkeypatch, moment):
    """Whatever instant it is, one whole checkpoint is there: the older one or the newer one."""
    step = ADAM | {"max_steps": 9}
    whole, broken = (make_site(tmp_path / name, local_step=step) for name in ("whole", "broken"))
    for site in (whole, broken):
        job = site.ask()
    Worker(whole).answer()
    real, left = state.publish, [3]

    def publish(temporary, final):
        left[0] -= 1
        if left[0] == 0 and moment == "before its name":
            raise Killed
        real(temporary, final)
        if left[0] == 0:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(state, "publish", publish)
        with pytest.raises(Killed):
            Worker(broken, put_away_every_s=0.0).answer()
    names = sorted(path.name for path in broken.spool.state("tiny").iterdir())
    if moment == "before its name":
        assert names == [".000000.step-000000002.tmp", "000000.step-000000001"]
    else:
        assert names == ["000000.step-000000001", "000000.step-000000002"]
    Worker(broken).answer()

    assert broken.delta(job).tobytes() == whole.delta(job).tobytes()
    assert [path.name for path in broken.spool.state("tiny").iterdir()] == ["000000"]


def test_a_checkpoint_that_cannot_be_written_does_not_stop_training(tmp_path, monkeypatch):
    site, whole = (make_site(tmp_path / name, local_step=ADAM) for name in ("site", "whole"))
    for each in (site, whole):
        job = each.ask()
    Worker(whole).answer()

    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("node_agent.worker.checkpoint.save", full)
        Worker(site, put_away_every_s=0.0).answer()
    said = [event.message or "" for event in read_status(site.spool, job.id)]

    assert any("could not be put away" in words and "No space" in words for words in said)
    assert last_status(site.spool, job.id).code == "storage"  # the state after the round, though


def test_a_middle_that_cannot_be_put_away_is_begun_again(tmp_path, monkeypatch):
    """No room at the very moment of leaving: still interrupted, not failed, and nothing is lost."""
    site, whole = (make_site(tmp_path / name, local_step=ADAM) for name in ("site", "whole"))
    for each in (site, whole):
        job = each.ask()
    Worker(whole).answer()
    with monkeypatch.context() as full:

        def refuse(*_args, **_more):
            raise JobFailedError("storage", "no room")

        full.setattr("node_agent.worker.state.save", refuse)
        Worker(site).answer(stop=StopAfter(site, 6))
    said = read_status(site.spool, job.id)
    assert said[-1].event == "interrupted"
    assert any("no room" in (event.message or "") for event in said)
    Worker(site).answer()

    assert site.delta(job).tobytes() == whole.delta(job).tobytes()


def test_the_middle_of_other_work_is_not_taken_up(tmp_path):
    site, fresh = (make_site(tmp_path / name, local_step=ADAM) for name in ("site", "fresh"))
    site.ask()
    Worker(site).answer(stop=StopAfter(site, 6))
    assert list(site.spool.state("tiny").glob("000000.step-*"))
    for each in (site, fresh):
        job = each.ask(seed=99)
        Worker(each).answer()

    assert site.delta(job).tobytes() == fresh.delta(job).tobytes()


def test_a_round_that_is_done_again_gives_the_same_bits(tmp_path):
    site = make_site(tmp_path, local_step=ADAM)
    worker = Worker(site)
    before = []
    for number in range(3):
        job = site.ask(number)
        worker.answer()
        before.append(site.delta(job).tobytes())
    shutil.rmtree(site.spool.out("tiny.2"))  # say the agent lost it
    worker.answer()

    assert site.delta(job).tobytes() == before[2]


def test_two_rounds_are_remembered_and_no_more(tmp_path):
    site = make_site(tmp_path, local_step={"max_steps": 1})
    for number in (0, 1, 5, 9):
        site.ask(number)
    Worker(site).answer()

    assert sorted(p.name for p in site.spool.state("tiny").iterdir()) == ["000005", "000009"]


class Command:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("damage", ["truncated", "garbage meta", "no rank file", "description"])
def test_a_spoilt_state_is_told_and_training_goes_on(tmp_path, damage):
    site = make_site(tmp_path, local_step=ADAM)
    site.ask(0)
    Worker(site).answer()
    folder = site.spool.state("tiny") / "000000"
    if damage == "truncated":
        (folder / PART).write_bytes((folder / PART).read_bytes()[:100])
    elif damage == "garbage meta":
        (folder / "meta.json").write_bytes(b"{")
    elif damage == "description":  # a pickle that would run a command
        (folder / ".metadata").write_bytes(pickle.dumps(Command(tmp_path / "ran")))
    else:
        (folder / PART).unlink()
    job = site.ask(1)
    Worker(site).answer()

    assert site.result(job).steps == 5
    remarks = [e.message for e in read_status(site.spool, job.id) if e.message]
    assert any("cannot be read" in remark for remark in remarks)
    assert not (tmp_path / "ran").exists()


def test_new_text_begins_with_the_next_epoch(tmp_path):
    site = make_site(tmp_path, documents=6, local_step={"max_steps": 3})
    worker = Worker(site)
    site.ask(0)
    worker.answer()
    write_text(site.root / "train.jsonl", documents=8, seed=5)
    job = site.ask(1)
    worker.answer()

    meta = json.loads((site.spool.state("tiny") / "000001" / "meta.json").read_bytes())
    assert (meta["epoch"], meta["index"]) == (1, 12)
    assert site.result(job).steps == 3


# -- the time box --------------------------------------------------------------------------------


def ticking(seconds: float) -> Clock:
    """A clock that moves by ``seconds`` whenever it is looked at."""
    ticks = iter(range(10**9))
    return Clock(now=lambda: 1000.0, monotonic=lambda: next(ticks) * seconds)


def test_the_box_is_steps_tokens_or_seconds_whichever_is_first(tmp_path):
    site = make_site(tmp_path, local_step={"max_steps": 50, "max_seconds": 1000})
    cases = [
        (0, {}, 50),
        (1, {"max_steps": 3}, 3),
        (2, {"max_steps": 60}, 50),  # the plan's limit holds as well
        (3, {"max_tokens": 4 * 32 * 4 + 1}, 5),  # the step that reaches it is the last
    ]
    worker = Worker(site)
    for number, limits, _ in cases:
        site.ask(number, **limits)
    worker.answer()

    assert [site.result(site.job(number)).steps for number, _, _ in cases] == [
        steps for _, _, steps in cases
    ]


def test_seconds_are_counted_by_the_clock(tmp_path):
    site = make_site(tmp_path, local_step={"max_steps": 50})
    job = site.ask(max_seconds=10.0)
    Worker(site, clock=ticking(1.0)).answer()

    result = site.result(job)
    assert 1 < result.steps < 50
    assert result.seconds >= 10.0


def test_a_box_smaller_than_a_step_holds_one(tmp_path):
    site = make_site(tmp_path)
    job = site.ask(max_seconds=1e-9, max_tokens=1)
    Worker(site).answer()

    assert site.result(job).steps == 1


def test_no_step_is_begun_that_would_pass_the_deadline(tmp_path):
    """Each look at the clock costs 3 s; at 1020 s the round must be over."""
    site = make_site(tmp_path, local_step={"max_steps": 50})
    job = site.ask(deadline_unix=1020.0)
    ticks = iter(range(10**9))
    now = [1000.0]

    def monotonic() -> float:
        now[0] = 1000.0 + next(ticks) * 3.0
        return now[0]

    Worker(site, clock=Clock(now=lambda: now[0], monotonic=monotonic)).answer()

    assert 1 <= site.result(job).steps < 6


def test_a_deadline_that_has_passed_is_said(tmp_path):
    site = make_site(tmp_path)
    job = site.ask(deadline_unix=1.0)
    Worker(site).answer()

    last = last_status(site.spool, job.id)
    assert (last.event, last.code) == ("failed", "train.no_steps")


def when_heard(site, act) -> Worker:
    """A worker; what it says of its progress makes somebody act, again and again."""
    worker = Worker(site, clock=ticking(1.0))
    real = worker.trainer.do

    class Heard:
        def __init__(self, status):
            self.status = status

        def event(self, event, **fields):
            if event == "progress":
                act()
            return self.status.event(event, **fields)

    def do(asked, context):
        context.status = Heard(context.status)
        return real(asked, context)

    worker.trainer.do = do
    return worker


def test_a_job_that_is_to_finish_has_the_update_of_its_steps(tmp_path):
    """The same bits as a time box of so many steps; then the data goes on from there."""
    early, boxed = (
        make_site(tmp_path / name, local_step=ADAM | {"max_steps": 1000})
        for name in ("early", "boxed")
    )
    job = early.ask()
    worker = when_heard(early, lambda: request_finish(early.spool, job.id))
    worker.answer()
    result = early.result(job)
    assert 0 < result.steps < 1000
    assert events(read_status(early.spool, job.id))[-1] == "done"
    boxed.ask(max_steps=result.steps)
    other = Worker(boxed)
    other.answer()
    assert early.delta(job).tobytes() == boxed.delta(job).tobytes()

    following = [site.ask(1, max_steps=2) for site in (early, boxed)]
    worker.answer()
    other.answer()
    assert early.delta(following[0]).tobytes() == boxed.delta(following[1]).tobytes()


def test_a_job_that_is_to_finish_before_its_first_step_has_no_update(tmp_path):
    site = make_site(tmp_path)
    job = site.ask()
    request_finish(site.spool, job.id)
    Worker(site).answer()

    last = last_status(site.spool, job.id)
    assert (last.event, last.code) == ("failed", "train.no_steps")


def test_a_job_that_is_removed_under_the_worker_ends(tmp_path):
    """As one that was cancelled; nobody listens any more, and the next job is done."""
    site = make_site(tmp_path, local_step={"max_steps": 1000})
    job = site.ask()
    worker = when_heard(site, lambda: forget_job(site.spool, job.id))
    worker.answer()
    assert not site.spool.out(job.id).exists()

    following = site.ask(1, max_steps=2)
    worker.answer()
    assert site.result(following).steps == 2


def test_a_cancelled_job_stops_between_two_steps(tmp_path):
    site = make_site(tmp_path, local_step={"max_steps": 1000})
    job = site.ask()
    when_heard(site, lambda: request_cancel(site.spool, job.id)).answer()

    assert "progress" in events(read_status(site.spool, job.id))
    assert events(read_status(site.spool, job.id))[-1] == "cancelled"
    assert not site.spool.result(job.id).exists()
    assert list(site.spool.state("tiny").glob("*")) == []


def test_progress_speaks_of_what_came_since(tmp_path):
    site = make_site(tmp_path, local_step={"max_steps": 6})
    job = site.ask()
    Worker(site, clock=ticking(0.5)).answer()

    said = [e for e in read_status(site.spool, job.id) if e.event == "progress"]
    assert len(said) >= 2
    assert all(e.max_steps == 6 and e.tokens_per_s > 0 for e in said)
    assert all(later.step > earlier.step for earlier, later in pairwise(said))
    assert 4 < said[0].loss < 7  # nats per token of a model that knows nothing: ln 259 = 5.56


# -- refusals ------------------------------------------------------------------------------------


def refused(site: Site, **fields) -> tuple[str, str]:
    job = site.ask(**fields)
    Worker(site).answer()
    last = last_status(site.spool, job.id)
    assert last.event == "failed"
    assert not site.spool.result(job.id).exists()
    return last.code, last.message


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_starting_model_that_is_not_finite(tmp_path, poison):
    site = make_site(tmp_path)
    theta = site.theta
    theta[site.manifest.offset("model.norm.weight") + 1] = poison
    theta.tofile(site.root / "theta.f32")

    code, message = refused(site)
    assert code == "train.non_finite"
    assert "model.norm.weight" in message


@pytest.mark.parametrize("clip", [None, 1.0])
def test_training_that_diverges(tmp_path, clip):
    site = make_site(
        tmp_path,
        local_step={"lr": 1e12, "max_steps": 30, "grad_clip": clip, "weight_decay": 1e6},
        evaluation={"languages": []},
    )

    assert refused(site)[0] == "train.non_finite"


def test_an_update_that_is_not_finite(tmp_path):
    """One step from a finite loss: only the parameters show it."""
    site = make_site(
        tmp_path, local_step={"lr": 1e12, "weight_decay": 1e12, "max_steps": 1, "momentum": 0.9}
    )
    theta = site.theta
    theta[site.manifest.offset("lm_head.weight")] = 1e20  # its decay alone leaves float32
    theta.tofile(site.root / "theta.f32")

    code, message = refused(site)
    assert (code, "lm_head.weight" in message) == ("train.non_finite", True)
    assert list(site.spool.state("tiny").glob("*")) == []  # nor are its moments kept


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("no theta", "model.theta"),
        ("short theta", "model.theta"),
        ("no plan", "job.plan"),
        ("plan of another run", "job.plan"),
        ("another manifest", "job.plan"),
        ("a tensor the model has not", "manifest_mismatch"),
        ("no text", "data.missing"),
        ("broken text", "data.malformed"),
        ("empty text", "data.empty"),
        ("broken held-out text", "data.malformed"),
    ],
)
def test_refused(tmp_path, what, code):
    site = make_site(tmp_path)
    fields = {}
    if what == "no theta":
        (site.root / "theta.f32").unlink()
    elif what == "short theta":
        site.theta[:-1].tofile(site.root / "theta.f32")
    elif what == "no plan":
        (site.root / "plan.json").unlink()
    elif what == "plan of another run":
        fields = {"run": "other", "id": "other.0"}
    elif what == "another manifest":
        data = json.loads((site.root / "manifest.json").read_bytes())
        data["tensors"].reverse()
        from protocols.canonical import canonical_bytes

        (site.root / "manifest.json").write_bytes(canonical_bytes(data))
    elif what == "a tensor the model has not":
        fields = {"select": ("nothing.weight",)}
    elif what == "no text":
        (site.root / "train.jsonl").unlink()
    elif what == "broken text":
        with (site.root / "train.jsonl").open("a") as file:
            file.write("{\n")
    elif what == "empty text":
        (site.root / "train.jsonl").write_text("")
    else:
        (site.root / "valid.jsonl").write_text("nonsense\n")

    found, message = refused(site, **fields)
    assert found == code
    assert "\n" not in message
    if code == "data.malformed":
        assert ".jsonl:" in message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TINY | {"vocab_size": 512}, "vocab_size must be 259"),
        (TINY | {"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        (TINY | {"num_attention_heads": 5}, "model.config"),
        (TINY | {"hidden_size": "wide"}, "model.config"),
        (TINY | {"max_position_embeddings": 16}, "sequence_length 32 is more than"),
        (TINY | {"num_hidden_layers": 3}, "other tensors than the manifest"),
    ],
)
def test_a_model_that_cannot_be(tmp_path, config, words):
    site = make_site(tmp_path, config=config)

    code, message = refused(site)
    assert code in ("model.config", "model.manifest")
    assert words in message


def test_a_bad_job_does_not_spoil_the_next(tmp_path):
    site = make_site(tmp_path, local_step=ADAM)
    clean = three_rounds(make_site(tmp_path / "clean", local_step=ADAM), restart=False)
    worker = Worker(site)
    job = site.ask(0)
    worker.answer()
    assert site.delta(job).tobytes() == clean[0]
    follow(site, site.delta(job))
    broken = site.data.model_copy(update={"valid": ("/nowhere",)})
    site.ask(1, data=broken)
    worker.answer()
    assert last_status(site.spool, "tiny.1").code == "data.missing"
    job = site.ask(1)
    worker.answer()

    assert site.delta(job).tobytes() == clean[1]


def test_text_is_indexed_again_only_when_it_was_touched(tmp_path, monkeypatch):
    site = make_site(tmp_path, local_step={"max_steps": 1})
    worker, calls = Worker(site), []
    monkeypatch.setattr(
        "node_agent.worker.trainer.index_corpus",
        lambda paths, encoder: (calls.append(1), index_corpus(paths, encoder))[1],
    )
    for number in range(3):
        site.ask(number)
    worker.answer()
    assert len(calls) == 1

    write_text(site.root / "train.jsonl", documents=9)
    site.ask(3)
    worker.answer()
    assert len(calls) == 2
