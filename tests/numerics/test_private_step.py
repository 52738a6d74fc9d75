"""Private jobs of the worker against DP-SGD written out plainly, and what they never do."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch

from node_agent.resident import Clock
from node_agent.spool import last_status, read_status
from node_agent.worker import checkpoint, private_step, state
from node_agent.worker.private_noise import StepSeeds, noised, round_by_chance, table_for
from policies.privacy.terms import local_noise
from tests.statistics.evidence import fits_scale
from tests.support.private_worker import (
    counted_bytes,
    plain_dpsgd,
    plain_sum,
    private_site,
    records_of,
    samples_of,
    without_noise,
)
from tests.support.training import StopAfter, Worker, reference_model
from tests.support.worker import TINY, events

torch.set_num_threads(1)


@pytest.fixture
def quiet(monkeypatch):
    """No noise: only then can sums be compared."""
    monkeypatch.setattr(private_step, "noised", without_noise)


def done(site, job, **options):
    """The update of a finished private job."""
    Worker(site, **options).answer()
    last = last_status(site.spool, job.id)
    assert last.event == "done", last
    return site.delta(job)


# -- the arithmetic ------------------------------------------------------------------------------


CASES = {
    "documents, momentum": ({}, {"momentum": 0.9}, ("hooks", "loop")),
    "documents, adamw": (
        {"max_sequences": 2},
        {"optimizer": "adamw", "lr": 3e-3, "betas": [0.9, 0.99], "weight_decay": 0.1},
        ("hooks",),
    ),
    "sequences": (
        {"unit": "sequence", "max_sequences": None, "sampling_rate": 0.1},
        {},
        ("hooks", "ghost", "loop"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_private_steps_match_a_plain_loop(tmp_path, quiet, name):
    privacy, step, ways = CASES[name]
    for way in ways:
        site = private_site(tmp_path / way, privacy=privacy | {"steps": 3}, local_step=step)
        job = site.ask()
        found = done(site, job, random_bytes=counted_bytes(), private_way=way)
        wanted = plain_dpsgd(site, counted_bytes())

        # AdamW divides by the root of a tiny second moment, which magnifies rounding.
        tolerance = 2e-5 if step.get("optimizer") == "adamw" else 1e-6
        assert np.abs(wanted).max() > 5e-3
        np.testing.assert_allclose(found, wanted, atol=tolerance, rtol=0)
        report = site.result(job).private
        assert (report.way, report.noise, report.expected_batch) == (way, "added", 6.0)
        records = records_of(site)
        assert report.records == len(records)
        assert report.sampled == sum(len(s) for s in samples_of(site, counted_bytes()))
        assert report.clipped <= report.sampled
        assert report.unused_rows == records.all_rows - records.used_rows


def test_the_divisor_is_public_and_not_the_size_of_the_sample(tmp_path, quiet):
    """Twice the expected batch, the same samples: half the update."""
    deltas = []
    for expected in (6.0, 12.0):
        privacy = {"expected_batch": expected, "steps": 1}
        site = private_site(tmp_path / str(expected), privacy=privacy)
        deltas.append(done(site, site.ask(), random_bytes=counted_bytes()))
    np.testing.assert_allclose(deltas[0], 2 * deltas[1], atol=1e-6, rtol=0)


def test_only_the_selected_tensors_move(tmp_path):
    names = ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight")
    site = private_site(tmp_path, trainable=list(names))
    job = site.ask(select=names)
    delta = done(site, job)

    wanted = sum(s.stop - s.start for s in site.manifest.select(names))
    assert delta.size == wanted
    assert np.abs(delta).min() < 1e-1 < np.abs(delta).max()


def test_shared_noise_is_left_to_the_agent(tmp_path):
    """``-S / B``: a descent direction without noise, and nothing is kept for later."""
    site = private_site(tmp_path, mode="record-distributed")
    job = site.ask()
    delta = done(site, job, random_bytes=counted_bytes())
    (sample,) = samples_of(site, counted_bytes(), noise=False)
    records, privacy = records_of(site), site.plan.privacy
    model = reference_model(site.theta, site.manifest)
    wanted = plain_sum(model, [records.read(n) for n in sample], privacy.clip_norm)

    assert len(sample) > 3
    np.testing.assert_allclose(delta, -wanted / privacy.expected_batch, atol=1e-6, rtol=0)
    assert site.result(job).private.noise == "later"
    folder = site.spool.state("tiny") / "000000"
    assert checkpoint.keys(folder) == {}


# -- the noise -----------------------------------------------------------------------------------


def test_the_noise_of_a_step_has_its_scale_and_no_other(tmp_path, monkeypatch):
    """The same sample with and without noise: the difference, in parameter units."""
    privacy = {"steps": 1, "noise_multiplier": 1.5}
    site = private_site(tmp_path, privacy=privacy, local_step={"lr": 1.0})
    noisy = done(site, site.ask(), random_bytes=counted_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(private_step, "noised", without_noise)
        quiet = done(site, site.ask(1), random_bytes=counted_bytes())
    noise = noisy.astype(np.float64) - quiet

    terms = site.plan.privacy
    sigma = terms.noise_multiplier * terms.clip_norm / terms.expected_batch
    made = local_noise(terms, noise.size)
    longer = math.sqrt(made.sensitivity.l2_squared) * 2.0**-made.exponent / terms.clip_norm
    assert 1 <= longer < 1.02  # what rounding adds to the sensitivity
    assert fits_scale(noise, (sigma * longer) ** 2)
    for factor in (2 / 3, 3 / 2):
        assert not fits_scale(noise, (sigma * longer * factor) ** 2)


def test_a_step_without_records_is_a_step_of_noise(tmp_path):
    """Nobody is drawn: as many steps, as much noise; left out, an observer would know."""
    site = private_site(
        tmp_path, privacy={"sampling_rate": 1e-12, "steps": 4, "insist": True}, documents=5
    )
    job = site.ask()
    delta = done(site, job)

    result, terms = site.result(job), site.plan.privacy
    assert (result.steps, result.private.empty_steps, result.private.sampled) == (4, 4, 0)
    step = site.plan.local_step.lr * terms.clip_norm / terms.expected_batch
    assert fits_scale(delta.astype(np.float64), 4 * step**2 * 1.015**2)
    assert not fits_scale(delta.astype(np.float64), 3 * step**2)  # one step skipped


def test_noise_is_never_used_twice(tmp_path):
    """Three fresh secrets a step, and two runs of one job have nothing in common."""
    asked = []

    def chance(size):
        asked.append(size)
        return counted[len(asked) - 1]

    source = counted_bytes()
    counted = [source(32) for _ in range(200)]
    site = private_site(tmp_path)
    first = done(site, site.ask(), random_bytes=chance)
    assert asked == [32] * (3 * 5)  # sample, dither, noise
    shutil.rmtree(site.spool.out("tiny.0"))
    again = done(site, site.ask(), random_bytes=chance)
    other = done(site, site.ask(1))  # the operating system's

    for a, b in ((first, again), (first, other), (again, other)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.2  # of the gradient; noise alone would give 1


def test_rounding_by_chance_is_right_on_average_and_belongs_to_the_coordinate():
    values = np.linspace(-3.0, 3.0, 4001)
    seed, gamma = bytes(range(32)), 2.0**-3
    whole = round_by_chance(values, 0, gamma, seed)
    assert np.all(np.abs(whole - values / gamma) < 1)
    assert abs((whole - values / gamma).mean()) < 6 * 0.5 / math.sqrt(values.size)
    for start, stop in ((0, 7), (7, 8), (8, 4001)):
        piece = round_by_chance(values[start:stop], start, gamma, seed)
        assert piece.tolist() == whole[start:stop].tolist()
    exact = np.array([-2.0, 0.0, 5.0])
    assert round_by_chance(exact, 0, 1.0, seed).tolist() == [-2, 0, 5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_sum_that_is_no_number_is_not_rounded(bad):
    from node_agent.resident import JobFailedError

    with pytest.raises(JobFailedError) as failed:
        round_by_chance(np.array([0.0, bad]), 0, 1.0, bytes(32))
    assert failed.value.code == "train.non_finite"


def test_pieces_of_a_sum_get_the_noise_of_their_place(tmp_path):
    privacy = private_site(tmp_path).plan.privacy
    noise = local_noise(privacy, 500)
    seeds = StepSeeds(bytes(32), bytes([1]) * 32)
    total = np.random.default_rng(1).normal(size=500)
    (whole,) = noised([total], noise=noise, seeds=seeds, divisor=2.0)
    parts = noised([total[:123], total[123:]], noise=noise, seeds=seeds, divisor=2.0)

    assert np.concatenate(list(parts)).tobytes() == whole.tobytes()
    assert table_for(noise.variance) is table_for(noise.variance)
    with pytest.raises(ValueError, match="coordinates"):
        list(noised([total[:123]], noise=noise, seeds=seeds, divisor=2.0))


def test_secrets_do_not_print():
    assert "01" not in repr(StepSeeds(b"01" * 16, b"01" * 16))


# -- all steps or none ---------------------------------------------------------------------------


def refused(site, **fields):
    """Code and sentence of a job that was not done; nothing of it is left."""
    job = site.ask(**fields)
    Worker(site).answer()
    last = last_status(site.spool, job.id)
    assert last.event == "failed", last
    assert not site.spool.result(job.id).exists()
    assert not site.spool.delta(job.id).exists()
    return last.code, last.message


@pytest.mark.parametrize(
    ("limit", "code"),
    [
        ({"max_steps": 4}, "private.limits"),
        ({"max_tokens": 10**9}, "private.limits"),
        ({"max_seconds": 1e9}, "private.limits"),
        ({"deadline_unix": 1.0}, "private.deadline"),
    ],
)
def test_a_job_that_cannot_do_all_steps_does_none(tmp_path, limit, code):
    assert refused(private_site(tmp_path), **limit)[0] == code


def test_a_deadline_in_the_middle_leaves_nothing(tmp_path):
    """Each look at the clock costs 3 s: two or three steps fit before 1020 s."""
    site = private_site(tmp_path, privacy={"steps": 50})
    job = site.ask(deadline_unix=1020.0)
    now = [1000.0]

    def monotonic() -> float:
        now[0] += 3.0
        return now[0]

    Worker(site, clock=Clock(now=lambda: now[0], monotonic=monotonic)).answer()
    last = last_status(site.spool, job.id)
    assert (last.event, last.code) == ("failed", "private.deadline")
    assert "of 50 steps" in last.message
    assert not site.spool.delta(job.id).exists()
    assert list(site.spool.state("tiny").glob("*")) == []  # nor is anything kept


def test_more_steps_than_the_plan_are_not_done(tmp_path):
    site = private_site(tmp_path)
    job = site.ask(max_steps=9)
    done(site, job)
    assert site.result(job).steps == 5


@pytest.mark.parametrize(
    ("config", "options", "code"),
    [
        (TINY | {"attention_dropout": 0.1}, {}, "private.dropout"),
        (TINY, {"private_way": "ghost"}, "private.path"),
        (TINY, {"private_way": "hooks", "checkpointing": True}, "private.path"),
    ],
)
def test_what_breaks_the_promise_is_refused(tmp_path, config, options, code):
    site = private_site(tmp_path)
    value = site.plan.model_dump(mode="json", by_alias=True)
    value["model"]["config"] = config
    (site.root / "plan.json").write_bytes(type(site.plan).from_value(value).to_bytes())
    job = site.ask()
    Worker(site, **options).answer()

    last = last_status(site.spool, job.id)
    assert (last.event, last.code) == ("failed", code)
    assert not site.spool.result(job.id).exists()


# -- restarts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 2, 4])
def test_an_interrupted_job_goes_on_with_fresh_chance(tmp_path, at):
    """The steps that were done stay done; no secret is asked for twice, none is on disk."""
    given = []
    source = counted_bytes()

    def chance(size):
        given.append(source(size))
        return given[-1]

    site = private_site(tmp_path, local_step={"momentum": 0.9})
    job = site.ask()
    stop = StopAfter(site, at + 2)
    Worker(site, random_bytes=chance).answer(stop=stop)
    assert stop.fired
    assert events(read_status(site.spool, job.id))[-1] == "interrupted"
    before = len(given)
    assert before == 3 * at + 1  # a sample was drawn that nobody acted on
    delta = done(site, job, random_bytes=chance)

    result = site.result(job)
    assert result.steps == 5
    assert len(given) == 3 * 5 + 1
    assert len(set(given)) == len(given)
    assert np.isfinite(delta).all()
    for file in site.spool.root.rglob("*"):
        if file.is_file():
            held = file.read_bytes()
            assert not any(secret in held or secret.hex().encode() in held for secret in given)


def test_a_killed_job_starts_afresh(tmp_path, quiet):
    """Nothing was put away: all steps are done again, from the round's model, by other chance."""

    class Killed(BaseException):
        pass

    source, asked = counted_bytes(), []

    def dies(size):
        asked.append(size)
        if len(asked) > 8:  # in the third step
            raise Killed
        return source(size)

    site = private_site(tmp_path)
    job = site.ask()
    with pytest.raises(Killed):
        Worker(site, random_bytes=dies).answer()
    assert not site.spool.delta(job.id).exists()
    assert not list(site.spool.root.glob("state/*/*"))
    found = done(site, job, random_bytes=counted_bytes("other"))

    np.testing.assert_allclose(found, plain_dpsgd(site, counted_bytes("other")), atol=1e-6)


def test_a_private_round_is_not_put_away_on_a_timer(tmp_path, quiet, monkeypatch):
    """Nothing of its middle is on disk, so nothing of it is done twice from there."""
    saved = []
    real = state.save

    def save(root, memory, *arguments, **more):
        saved.append(memory)
        return real(root, memory, *arguments, **more)

    monkeypatch.setattr(state, "save", save)
    site = private_site(tmp_path)
    job = site.ask()
    done(site, job, random_bytes=counted_bytes(), put_away_every_s=0.0)

    assert [memory.partial for memory in saved] == [None]  # the state after the round


@pytest.mark.parametrize(
    ("job", "code"),
    [({"carry": ("/late.f32",)}, "job.carry"), ({"weights": (1.0,)}, "private.weights")],
)
def test_what_is_not_charged_does_not_come_in(tmp_path, job, code):
    """Work of an earlier round; records that count more than others."""
    site = private_site(tmp_path)
    weights = job.pop("weights", ())
    asked = site.ask(data=site.data.model_copy(update={"weights": weights}), **job)
    Worker(site, random_bytes=counted_bytes()).answer()

    last = last_status(site.spool, asked.id)
    assert (last.event, last.code) == ("failed", code)
    assert not site.spool.result(asked.id).exists()


def test_moments_of_noisy_gradients_are_kept_between_rounds(tmp_path, quiet):
    """They are functions of what has its noise already."""
    adam = {"optimizer": "adamw", "lr": 3e-3}
    deltas = {}
    for kept in (True, False):
        site = private_site(tmp_path / str(kept), local_step=adam | {"keep_optimizer": kept})
        for number in range(2):
            job = site.ask(number)
            deltas[kept] = done(site, job, random_bytes=counted_bytes(str(number)))
    assert np.abs(deltas[True] - deltas[False]).max() > 1e-4


# -- what is not said ----------------------------------------------------------------------------


def test_what_no_noise_covers_is_not_handed_to_the_agent(tmp_path):
    """Tokens, records and losses of a sample tell of it; the plan's number of steps does not."""
    site = private_site(tmp_path)
    job = site.ask()
    ticks = iter(range(10**6))
    done(site, job, clock=Clock(monotonic=lambda: float(next(ticks))))

    result = site.result(job)
    assert (result.steps, result.tokens, result.records, result.loss_nats) == (5, 0, 0, 0.0)
    said = read_status(site.spool, job.id)
    steps = [event.step for event in said if event.event == "progress"]
    assert steps == [*range(6), None]
    (remark,) = [event.message for event in said if event.message]
    assert f"{result.private.clipped} of {result.private.sampled} sampled" in remark
    assert f"{result.private.unused_rows} sequences of long documents" in remark
    assert all(not event.tokens and event.loss is None for event in said)
    assert not any(event.tokens_per_s for event in said)
