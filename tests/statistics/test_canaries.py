"""Secrets planted in a site's text: how well a model trained there tells them from guesses.

Exposure (Carlini et al., "The Secret Sharer", USENIX Security 2019) is log2 of the number of
possible secrets minus log2 of the true one's rank by loss: log2(1000) = 9.97 when it is the model's
first guess, 1.44 on average by chance. The figures are printed (``pytest -s``) and reported as
properties; protocols/spec/private-step.md quotes them.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from node_agent.spool import last_status
from node_agent.worker.model import ResidentModel
from policies.privacy.accounting import account_renyi
from policies.privacy.terms import noise_terms
from tests.support.private_worker import counted_bytes, private_site
from tests.support.training import ALONE, Worker, make_site
from tests.support.worker import SENTENCES, TINY

pytestmark = pytest.mark.slow
torch.set_num_threads(1)

CANARIES = (
    ("La clave de Ana es ", 417),
    ("O código do cofre: ", 826),
    ("Expediente número ", 153),
    ("A senha antiga era ", 968),
)
GUESSES = 1000  # three digits
CHANCE = 1.44  # bits: the mean of log2(n) - log2(rank) over ranks 1 .. n


def plant(site) -> None:
    """Each secret once, among 28 documents of other text."""
    texts = [f"{prefix}{secret:03d}." for prefix, secret in CANARIES]
    texts += [SENTENCES[i % len(SENTENCES)][:48] for i in range(28)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (site.root / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def exposures(theta: np.ndarray) -> list[float]:
    """Of each canary, in bits."""
    model = ResidentModel(TINY, select="none", ranks=ALONE)
    model.load(theta)
    found = []
    for prefix, secret in CANARIES:
        rows = [[256, *f"{prefix}{guess:03d}.".encode()] for guess in range(GUESSES)]
        tokens = torch.tensor(rows)
        with torch.no_grad():
            nll = model.nll(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).numpy()
        found.append(float(np.log2(GUESSES) - np.log2(1 + (nll < nll[secret]).sum())))
    return found


def trained(site, **options) -> list[float]:
    """Exposures after the site's job."""
    plant(site)
    job = site.ask()
    Worker(site, **options).answer()
    assert last_status(site.spool, job.id).event == "done"
    return exposures(site.theta + site.delta(job))


def test_secrets_are_learned_without_privacy_and_not_with_it(tmp_path, record_property):
    """As many steps on as much text by the same optimizer; the private ones clip and add noise."""
    step = {"optimizer": "adamw", "lr": 1e-2, "sequence_length": 48, "batch_size": 8}
    steps = 120
    plain = make_site(
        tmp_path / "plain", local_step=step | {"max_steps": steps}, evaluation={"languages": []}
    )
    private = private_site(
        tmp_path / "private",
        privacy={
            "steps": steps,
            "max_sequences": 1,
            "noise_multiplier": 1.5,
            "sampling_rate": 0.25,
            "expected_batch": 8.0,
        },
        local_step=step,
    )
    without = trained(plain)
    with_privacy = trained(private, random_bytes=counted_bytes("canaries"))

    charge = noise_terms(private.plan, private.manifest.coordinates).charge
    epsilon = account_renyi([charge], delta=1e-5).epsilon
    figures = {
        "bits without privacy": round(float(np.mean(without)), 2),
        "bits with privacy": round(float(np.mean(with_privacy)), 2),
        "epsilon at delta 1e-5": round(epsilon, 2),
    }
    for name, value in figures.items():
        record_property(name, value)
    print(figures)
    assert min(without) > 8  # else there was nothing to hide
    # The mean of four ranks by chance has a deviation of 0.7 bits.
    assert np.mean(with_privacy) < CHANCE + 4 * 0.7
