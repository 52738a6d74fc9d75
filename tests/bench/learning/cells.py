"""The rows of the benchmark: each is one run, or one for each site.

base                the model that all others but the last two begin with, on public text
centralised         all texts in one place, with as many steps as all sites together do
centralised-wide    the same tokens in batches that are as many times larger, and fewer steps
federated           the mean of what sites learn, in the open
federated-masked    the same through the secure sum: must be the same integers
local-only          each site by itself, with everybody's budget of tokens
lora-*              adapters: all texts in one place, and the three ways to share factors
private-*           every step differentially private by document, at that epsilon
*-scratch           from random weights
"""

from __future__ import annotations

import functools
import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node_agent.spool import DataPaths
from policies.privacy.accounting import account_renyi
from policies.privacy.claim import claim_of
from policies.privacy.events import Charge, SampledGaussian
from policies.privacy.sensitivity import Relation, Unit
from protocols.crypto.signatures import public_bytes
from protocols.plan import Plan
from protocols.round_vector import round_layout
from protocols.secagg.threshold import SecaggTerms
from tests.bench.learning.federation import Federation, Score, Site
from tests.bench.learning.masks import identity
from tests.bench.learning.models import Start, hand_out, start_of, untrained
from tests.bench.learning.settings import Amount, Rates
from tests.bench.learning.texts import UNION, SiteTexts, lay_out

AVERAGE = {"optimizer": "average", "lr": 1.0}


def nesterov(momentum: float, lr: float = 1.0) -> dict[str, Any]:
    """The outer optimizer with momentum."""
    return {"optimizer": "nesterov", "lr": lr, "momentum": momentum}


EPSILONS = (8.0, 2.0)
DELTA = "1e-5"

CENTRAL = Rates(lr=4e-3)
WIDE = Rates(lr=4e-3)
SITES = Rates(lr=4e-3)
LORA = Rates(lr=1e-2)
PRIVATE = Rates(lr=4e-3, warmup=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Everything that the rows of one seed share."""

    work: Path
    amount: Amount
    seed: int
    sites: Sequence[SiteTexts]
    paths: Mapping[str, DataPaths]
    public: DataPaths  # what the base is trained on
    languages: tuple[str, ...]
    say: Callable[[str], None] = field(default=print, repr=False)
    workers: dict[tuple[str, DataPaths], Site] = field(default_factory=dict, repr=False)
    runs: list[str] = field(default_factory=list, repr=False)  # a worker never sees a run twice

    @classmethod
    def make(
        cls,
        work: Path,
        amount: Amount,
        *,
        seed: int,
        sites: Sequence[SiteTexts],
        public: SiteTexts,
        tuning: bool = False,
        say: Callable[[str], None] = print,
    ) -> World:
        """Write the texts of all sites and of the public part."""
        paths = lay_out(work / "texts", sites, tuning=tuning)
        held = [d for site in sites for d in (site.tuning if tuning else site.report)]
        return cls(
            work=work,
            amount=amount,
            seed=seed,
            sites=sites,
            paths=paths,
            public=lay_out(work / "public", [public], tuning=tuning)[public.name],
            languages=tuple(sorted({d.lang for d in held})),
            say=say,
        )

    @property
    def names(self) -> list[str]:
        return sorted(site.name for site in self.sites)

    # -- models ----------------------------------------------------------------------------------

    def scratch(self) -> Path:
        """The random model."""
        folder = self.work / "untrained"
        return folder if folder.exists() else untrained(folder, self.amount, seed=self.seed)

    def base(self) -> Path:
        """The model trained on the public part alone."""
        folder = self.work / "base"
        if not folder.exists():
            start = start_of(self.work / "base-start", self.scratch(), self.amount, seed=self.seed)
            data = DataPaths(train=self.public.train, valid=self.paths[UNION].valid)
            made = self._run(
                "base",
                start,
                {"public": data},
                rates=CENTRAL,
                steps=self.amount.base_steps,
                rounds=1,
            )
            hand_out(start, made.theta, self.work / "base-new")
            (self.work / "base-new").rename(folder)
        return folder

    # -- one run ---------------------------------------------------------------------------------

    def _run(
        self,
        name: str,
        start: Start,
        data: Mapping[str, DataPaths],
        *,
        rates: Rates,
        rounds: int,
        steps: int,
        masked: bool = False,
        batch: int | None = None,
        extra: dict[str, Any] | None = None,
        scored: int | None = None,
    ) -> Federation:
        amount = self.amount
        roster = sorted(data)
        self.runs.append(f"{name}-{len(self.runs)}")
        value: dict[str, Any] = {
            "federation": "bench",
            "run": self.runs[-1],
            "mode": "aggregate-only" if masked else "open",
            "roster": roster,
            "min_participants": len(roster),
            "rounds": rounds,
            "model": start.model,
            "trainable": start.trainable,
            "local_step": {
                "optimizer": "adamw",
                "lr": rates.lr,
                "betas": [0.9, 0.95],
                "weight_decay": 0.01,
                "warmup_steps": rates.warmup,
                "batch_size": batch or amount.batch,
                "sequence_length": amount.sequence,
                "grad_clip": 1.0,
                "max_steps": steps,
                "keep_optimizer": True,
            },
            "outer": rates.outer,
            "vector": {
                "ring_bits": 24 if len(roster) == 1 else 20,
                "scale": {"mode": "per-block", "first_bound": min(0.5, 2 * steps * rates.lr)},
            },
            "evaluation": {
                "languages": list(self.languages),
                "final": True,
                "every": max(1, math.ceil(rounds / max(1, scored or amount.scored))),
            },
        }
        value |= extra or {}
        if value["mode"] != "open":
            terms = SecaggTerms.for_roster(len(roster))
            value["secagg"] = {
                "threshold": terms.threshold,
                "colluders": terms.colluders,
                "min_surviving": terms.min_surviving,
                "keys": {node: public_bytes(identity(node)).hex() for node in roster},
            }
        root = self.work / "runs" / self.runs[-1]
        shutil.rmtree(root, ignore_errors=True)
        federation = Federation(
            root,
            plan=Plan.from_value(value),
            manifest=start.manifest,
            theta=start.theta,
            sites={name: self.site(name, paths) for name, paths in data.items()},
            base=start.folder,
            seed=self.seed,
            say=lambda text: self.say(f"{name}: {text}"),
        )
        federation.run()
        shutil.rmtree(root, ignore_errors=True)
        return federation

    def score(self, name: str, start: Start) -> Federation:
        """Score a model as it is: one step at a rate of nothing."""
        return self._run(
            name, start, self.together(), rates=Rates(lr=1e-12), rounds=1, steps=1, scored=1
        )

    def site(self, name: str, paths: DataPaths) -> Site:
        """The worker that has these texts; it keeps its index of them from run to run."""
        key = (name, paths)
        if key not in self.workers:
            root = self.work / "sites" / f"{len(self.workers)}-{name}"
            shutil.rmtree(root, ignore_errors=True)
            self.workers[key] = Site(root, name, paths, seed=self.seed)
        return self.workers[key]

    def start(self, folder: Path, factors: str | None = None) -> Start:
        """What a run over a folder begins with."""
        where = self.work / "starts" / f"{folder.name}-{factors or 'whole'}"
        return start_of(where, folder, self.amount, seed=self.seed, factors=factors)

    def together(self) -> dict[str, DataPaths]:
        return {UNION: self.paths[UNION]}

    def apart(self) -> dict[str, DataPaths]:
        return {name: self.paths[name] for name in self.names}

    # -- kinds of rows -----------------------------------------------------------------------------

    def central(
        self,
        name: str,
        *,
        factors: str | None = None,
        rates: Rates = CENTRAL,
        scratch: bool = False,
    ) -> Federation:
        """All texts in one place; the steps of all sites, of the same size."""
        amount = self.amount
        folder = self.scratch() if scratch else self.base()
        steps = amount.inner * len(self.sites)
        return self._run(
            name,
            self.start(folder, factors),
            self.together(),
            rates=rates,
            rounds=amount.rounds,
            steps=steps,
        )

    def wide(self, name: str, *, rates: Rates = WIDE) -> Federation:
        """All texts in one place; as many steps as one site does, each of everybody's size."""
        amount = self.amount
        return self._run(
            name,
            self.start(self.base()),
            self.together(),
            rates=rates,
            rounds=amount.rounds,
            steps=amount.inner,
            batch=amount.batch * len(self.sites),
        )

    def federated(
        self,
        name: str,
        *,
        factors: str | None = None,
        rates: Rates = SITES,
        masked: bool = False,
        scratch: bool = False,
        inner: int | None = None,
    ) -> Federation:
        """The mean of what sites learn."""
        amount = self.amount
        folder = self.scratch() if scratch else self.base()
        steps = inner or amount.inner
        rounds = max(1, amount.rounds * amount.inner // steps)
        return self._run(
            name,
            self.start(folder, factors),
            self.apart(),
            rates=rates,
            masked=masked,
            rounds=rounds,
            steps=steps,
        )

    def local(self, name: str, site: str, *, rates: Rates = CENTRAL) -> Federation:
        """One site by itself, scored on everybody's text."""
        amount = self.amount
        data = DataPaths(train=self.paths[site].train, valid=self.paths[UNION].valid)
        return self._run(
            name,
            self.start(self.base()),
            {site: data},
            rates=rates,
            rounds=amount.rounds,
            steps=amount.inner * len(self.sites),
            scored=1,
        )

    def private(
        self, name: str, *, epsilon: float, factors: str | None = "ffa", rates: Rates = PRIVATE
    ) -> tuple[Federation, float]:
        """Every local step is one of DP-SGD at the site; also the noise multiplier."""
        amount = self.amount
        documents = sum(len(site.train) for site in self.sites) / len(self.sites)
        rate = min(0.5, amount.private_batch / documents)
        steps = amount.private_rounds * amount.private_steps
        noise = noise_for(epsilon, rate=rate, steps=steps)
        federation = self._run(
            name,
            self.start(self.base(), factors),
            self.apart(),
            rates=rates,
            rounds=amount.private_rounds,
            steps=amount.private_steps,
            extra={
                "mode": "record-local",
                "privacy": {
                    "unit": "document",
                    "max_sequences": 2,
                    "clip_norm": 0.5,
                    "noise_multiplier": noise,
                    "sampling_rate": rate,
                    "expected_batch": rate * documents,
                    "steps": amount.private_steps,
                    "delta": DELTA,
                    "held_out": "public",
                },
                "local_step": {
                    "optimizer": "adamw",
                    "lr": rates.lr,
                    "betas": [0.9, 0.95],
                    "sequence_length": amount.sequence,
                    "max_steps": amount.private_steps,
                    "keep_optimizer": True,
                },
            },
        )
        return federation, noise


def epsilon_of(noise: float, *, rate: float, steps: int) -> float:
    """What so many private steps cost a document, by the accountant that nodes use."""
    charge = Charge(
        event=SampledGaussian(sampling_rate=rate, noise_multiplier=noise, discrete=True),
        relation=Relation.ADD_OR_REMOVE_ONE,
        unit=Unit.DOCUMENT,
        count=steps,
    )
    return account_renyi([charge], delta=float(DELTA)).epsilon


@functools.cache
def noise_for(epsilon: float, *, rate: float, steps: int) -> float:
    """The least noise multiplier, to a hundredth, that keeps ``epsilon``."""
    low, high = 1, 3000  # hundredths
    while low < high:
        middle = (low + high) // 2
        if epsilon_of(middle / 100, rate=rate, steps=steps) <= epsilon:
            high = middle
        else:
            low = middle + 1
    return low / 100


def worth(federation: Federation) -> dict[str, Any]:
    """What a run came to, as JSON."""
    last: Score = federation.scores[federation.plan.rounds]
    return {
        "bits": round(last.bits(), 5),
        "languages": {name: round(last.bits(name), 5) for name in sorted(last.size)},
        "bytes": dict(sorted(last.size.items())),
        "curve": [
            [index, round(score.bits(), 5)] for index, score in sorted(federation.scores.items())
        ],
        "tokens": federation.tokens,
        "rounds": federation.plan.rounds,
        "theta": hashlib.sha256(federation.theta.tobytes()).hexdigest(),
        "sums": hashlib.sha256(" ".join(federation.sums).encode()).hexdigest(),
    }


# -- what is run ---------------------------------------------------------------------------------

Made = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One row of one seed."""

    name: str
    run: Callable[[World], Made]


def _base(world: World) -> Made:
    """The base as it is: one round that only scores it."""
    start = world.start(world.base())
    made = world.score("base", start)
    return worth(made) | {
        "tokens": world.amount.base_steps * world.amount.batch * world.amount.sequence
    }


def _private(world: World, name: str, epsilon: float) -> Made:
    made, noise = world.private(name, epsilon=epsilon)
    return worth(made) | {"noise_multiplier": noise, "epsilon": spent(made), "delta": DELTA}


def spent(federation: Federation) -> float:
    """Epsilon of a document after all rounds, by the claim that nodes log."""
    plan = federation.plan
    coordinates = round_layout(plan, 0, federation.manifest).model_coordinates
    claim = claim_of(plan, 0, coordinates)
    if claim is None:
        raise ValueError("the plan is not private")
    return account_renyi([claim.charge().times(plan.rounds)], delta=float(DELTA)).epsilon


def headline() -> list[Cell]:
    """What the target is about."""
    return [
        Cell(name="base", run=_base),
        Cell(name="centralised", run=lambda w: worth(w.central("centralised"))),
        Cell(name="federated", run=lambda w: worth(w.federated("federated"))),
        Cell(name="centralised-wide", run=lambda w: worth(w.wide("centralised-wide"))),
        Cell(
            name="federated-masked",
            run=lambda w: worth(w.federated("federated-masked", masked=True)),
        ),
    ]


def others(names: Sequence[str]) -> list[Cell]:
    """What it stands beside."""
    made = [
        Cell(
            name="lora-centralised",
            run=lambda w: worth(w.central("lora-centralised", factors="fedit", rates=LORA)),
        )
    ]
    made += [
        Cell(
            name=f"lora-{factors}",
            run=lambda w, f=factors: worth(w.federated(f"lora-{f}", factors=f, rates=LORA)),
        )
        for factors in ("ffa", "rolora", "fedit")
    ]
    for epsilon in EPSILONS:
        name = f"private-{epsilon:g}"
        made.append(Cell(name=name, run=lambda w, n=name, e=epsilon: _private(w, n, e)))
    for site in names:
        name = f"local-only-{site}"
        made.append(Cell(name=name, run=lambda w, n=name, s=site: worth(w.local(n, s))))
    made += [
        Cell(
            name="centralised-scratch",
            run=lambda w: worth(w.central("centralised-scratch", scratch=True)),
        ),
        Cell(
            name="federated-scratch",
            run=lambda w: worth(w.federated("federated-scratch", scratch=True)),
        ),
    ]
    return made


def tuning() -> list[Cell]:
    """Rates that were tried, on other held-out text."""

    def cell(name: str, run: Callable[[World, str], Federation]) -> Cell:
        return Cell(name=name, run=lambda w: worth(run(w, name.replace(".", "-"))))

    made = []
    for lr in (4e-3, 8e-3, 2e-3):
        rates = Rates(lr=lr)
        made.append(cell(f"centralised lr {lr:g}", lambda w, n, r=rates: w.central("t", rates=r)))
    for lr, outer, inner in (
        (4e-3, nesterov(0.5), 12),
        (8e-3, nesterov(0.5), 12),
        (8e-3, AVERAGE, 12),
        (4e-3, nesterov(0.7), 12),
        (4e-3, AVERAGE, 12),
        (2e-3, AVERAGE, 12),
        (4e-3, AVERAGE, 6),
    ):
        rates = Rates(lr=lr, outer=outer)
        how = "average" if outer is AVERAGE else f"nesterov {outer['momentum']:g}"
        made.append(
            cell(
                f"federated lr {lr:g} {how}" + ("" if inner == 12 else f" inner {inner}"),
                lambda w, n, r=rates, i=inner: w.federated("t", rates=r, inner=i),
            )
        )
    return made
