"""Plans that would break their own guarantee are refused, with the reason (spec/plan.md, 5)."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest

from policies.privacy.claim import Claim, claim_of, spent_by
from policies.privacy.events import DistributedDiscreteGaussian, SampledGaussian
from policies.privacy.sensitivity import Relation, Unit
from policies.privacy.terms import KAPPA, local_noise, noise_terms
from protocols.errors import MalformedMessageError, PlanRefusedError
from protocols.noise.noise_table import MOST_DISTANCE, NoiseTable
from protocols.plan import Plan
from protocols.plan_privacy import PRIVATE_MODES
from protocols.tensors.ring import Ring
from protocols.vectors.make_privacy import FILES
from tests.support.plans import plan_value
from tests.support.private_plans import KEYS, SECAGG, private_plan, private_value

RECORD = ("record-local", "record-distributed")
SHARED = ("record-distributed", "institution")
BUILTIN = {"kind": "builtin", "max_steps": 10}

REFUSED = [
    # clause, modes, change, what the sentence says
    ("5.1 no terms", PRIVATE_MODES, {"privacy": None}, "needs it"),
    (
        "5.2 unit",
        RECORD,
        {
            "privacy.unit": "institution",
            "privacy.max_sequences": None,
            "privacy.sampling_rate": None,
            "privacy.expected_batch": None,
            "privacy.steps": None,
        },
        "is not what mode",
    ),
    ("5.2 no cap", RECORD, {"privacy.max_sequences": None}, "max_sequences"),
    ("5.2 cap of nothing", RECORD, {"privacy.unit": "sequence"}, "max_sequences"),
    ("5.3 no rate", RECORD, {"privacy.sampling_rate": None}, "sampling_rate"),
    ("5.3 no batch", RECORD, {"privacy.expected_batch": None}, "expected_batch"),
    ("5.3 rate above 1", RECORD, {"privacy.sampling_rate": 1.5}, "sampling_rate"),
    ("5.3 no steps", RECORD, {"privacy.steps": None}, "steps"),
    ("5.3 amplified", ("institution",), {"privacy.sampling_rate": 0.1}, "amplifies nothing"),
    ("5.4 delta is a float", PRIVATE_MODES, {"privacy.delta": 1e-5}, "delta"),
    ("5.4 delta is 0", PRIVATE_MODES, {"privacy.delta": "0.0"}, "decimal"),
    ("5.4 delta is 1", PRIVATE_MODES, {"privacy.delta": "1"}, "decimal"),
    ("5.4 one in all", RECORD, {"privacy.delta": "1e-2"}, "one record at random"),
    ("5.5 clip of 0", PRIVATE_MODES, {"privacy.clip_norm": 0.0}, "clip_norm"),
    ("5.5 no clip", PRIVATE_MODES, {"privacy.clip_norm": None}, "clip_norm"),
    ("5.5 two clips", SHARED, {"vector.clip_norm": 1.0}, "vector.clip_norm"),
    ("5.6 private weight", PRIVATE_MODES, {"vector.weight_cap_tokens": 1000}, "no noise covers"),
    ("5.7 scores", PRIVATE_MODES, {"evaluation.languages": ["es"]}, "not covered by the noise"),
    ("5.8 flower", RECORD, {"local_step": {"kind": "flower", "app": "a:b"}}, "cannot see"),
    ("5.8 batch clip", RECORD, {"local_step.grad_clip": 1.0}, "grad_clip"),
    ("5.8 proximal", RECORD, {"local_step.proximal_mu": 0.1}, "proximal_mu"),
    ("5.8 by tokens", RECORD, {"local_step.max_tokens": 10}, "tell of the data"),
    ("5.8 by seconds", RECORD, {"local_step.max_seconds": 10}, "tell of the data"),
    ("5.8 other steps", ("record-local",), {"local_step": BUILTIN | {"max_steps": 11}}, "charged"),
    ("5.9 steps", ("record-distributed",), {"privacy.steps": 2}, "steps = 1"),
    ("5.9 adam", ("record-distributed",), {"local_step.optimizer": "adamw"}, "sgd"),
    ("5.9 momentum", ("record-distributed",), {"local_step.momentum": 0.9}, "momentum"),
    ("5.9 decay", ("record-distributed",), {"local_step.weight_decay": 0.1}, "weight_decay"),
    ("5.9 warm-up", ("record-distributed",), {"local_step.warmup_steps": 1}, "warmup"),
    ("5.9 rate", ("record-distributed",), {"local_step.lr": 0.5}, "outer.lr"),
    ("5.9 keeps", ("record-distributed",), {"local_step.keep_optimizer": True}, "without noise"),
    ("5.10 scales", SHARED, {"vector.scale": {"mode": "per-block"}}, "one scale"),
    ("5.11 own noise", SHARED, {"privacy.colluders": None}, "colluders"),
    ("5.11 nobody", SHARED, {"privacy.colluders": 0}, "colluders"),
    ("5.11 all", SHARED, {"privacy.colluders": 3}, "no honest share"),
    ("5.11 not its own", ("record-local",), {"privacy.colluders": 1}, "its own noise"),
    ("5.12 unknown", PRIVATE_MODES, {"privacy.surprise": 1}, "surprise"),
    ("5.12 accountant", PRIVATE_MODES, {"privacy.accountant": "gdp"}, "accountant"),
    ("5.12 data set", PRIVATE_MODES, {"privacy.dataset": "../x"}, "dataset"),
]


@pytest.mark.parametrize(
    ("mode", "change", "says"),
    [
        pytest.param(mode, change, says, id=f"{clause}, {mode}")
        for clause, modes, change, says in REFUSED
        for mode in modes
    ],
)
def test_refused(mode, change, says):
    with pytest.raises(MalformedMessageError, match=says):
        private_plan(mode, change)


@pytest.mark.parametrize("mode", PRIVATE_MODES)
def test_a_private_plan_reads_what_it_writes(mode):
    """The rows above are refused for what they change, not for what they start from."""
    plan = private_plan(mode)
    assert Plan.from_bytes(plan.to_bytes()) == plan
    assert plan.adds_noise == (mode in SHARED)


def test_terms_are_for_private_modes_only():
    value = private_value("record-local") | {"mode": "aggregate-only"}
    with pytest.raises(MalformedMessageError, match="not differentially private"):
        Plan.from_value(value)
    with pytest.raises(MalformedMessageError, match="not differentially private"):
        Plan.from_value(plan_value(privacy=value["privacy"]))


def test_what_is_allowed_stays_allowed():
    private_plan("record-local", {"local_step": BUILTIN | {"optimizer": "adamw", "momentum": 0.0}})
    private_plan("record-local", {"vector.clip_norm": 1.0})  # of what is private already
    private_plan("institution", {"local_step": {"kind": "flower", "app": "a:b"}})
    private_plan("record-local", {"evaluation.languages": ["es"], "privacy.held_out": "public"})
    private_plan("record-local", {"privacy.delta": "0.01", "privacy.insist": True})
    private_plan("record-distributed", {"outer": {"optimizer": "nesterov", "momentum": 0.9}})


# -- grid, noise and clamp limit -------------------------------------------------------------


@pytest.mark.parametrize("coordinates", [1, 2, 1000, 100_000, 10**7, 10**8])
def test_the_grid_of_a_step_lengthens_a_record_little_and_its_noise_is_as_promised(coordinates):
    privacy = private_plan("record-local", {"privacy.noise_multiplier": 1.1}).privacy
    noise = local_noise(privacy, coordinates)
    clip = Fraction(privacy.clip_norm) * Fraction(2) ** noise.exponent
    assert noise.variance >= Fraction(1.1) ** 2 * noise.sensitivity.l2_squared
    assert noise.sensitivity.l2_squared >= clip**2
    if 1000 <= coordinates <= 10**7:
        assert noise.sensitivity.l2_squared < (clip * Fraction(105, 100)) ** 2
    assert noise.sensitivity.unit is Unit.DOCUMENT


@pytest.mark.parametrize("mode", PRIVATE_MODES)
def test_the_cost_of_a_round_is_that_of_its_noise(mode):
    plan = private_plan(mode)
    terms = noise_terms(plan, 1000)
    event, z = terms.charge.event, plan.privacy.noise_multiplier
    match mode:
        case "record-local":
            assert event == SampledGaussian(sampling_rate=0.05, noise_multiplier=z, discrete=True)
            assert (terms.charge.count, terms.shares, terms.limit) == (10, 1, None)
        case "record-distributed":
            assert isinstance(event, SampledGaussian)
            assert event.sampling_rate == 0.05
            assert z <= event.noise_multiplier < z * 1.001
            assert (terms.charge.count, terms.shares) == (1, 2)
            # One record moves the mean of the sum by C / B, not by C.
            assert terms.sensitivity.l2_squared < 2 * (2**12 / 16) ** 2
        case "institution":
            assert isinstance(event, DistributedDiscreteGaussian)
            assert event.shares == 2  # m_min = 3 less one colluder, never attendance
            assert event.shares * event.share_variance >= z**2 * event.l2_squared
            assert terms.charge.relation is Relation.REPLACE_SPECIAL


@pytest.mark.parametrize("mode", SHARED)
@pytest.mark.parametrize("bits", [16, 20, 24])
def test_clamped_updates_and_their_noise_fit_the_ring(mode, bits):
    exponents = {16: 8, 20: 12, 24: 14}
    change = {
        "vector": {"ring_bits": bits, "scale": {"mode": "fixed", "exponent": exponents[bits]}}
    }
    terms = noise_terms(private_plan(mode, change), 100)
    noise = KAPPA * math.sqrt(3 * float(terms.share_variance))
    assert 3 * terms.limit + noise <= 0.9 * 2 ** (bits - 1)


RING_16, FINE = {"ring_bits": 16}, {"mode": "fixed", "exponent": 13}
REFUSED_TERMS = [
    ("5.13", "institution", {"vector.scale.exponent": 2}, 4, "privacy.share_too_small"),
    ("5.13", "record-distributed", {"vector.scale.exponent": 1}, 4, "privacy.share_too_small"),
    ("5.14", "institution", {"vector": RING_16 | {"scale": FINE}}, 4, "privacy.headroom"),
    ("5.14", "record-distributed", {"vector.scale.exponent": 19}, 100, "privacy.headroom"),
    ("5.14", "institution", {"vector.scale.exponent": 17}, 4, "privacy.noise_too_large"),
    ("5.15", "institution", {"privacy.insist": False}, 10**4, "privacy.noise_drowns"),
]


@pytest.mark.parametrize(("clause", "mode", "change", "d", "rule"), REFUSED_TERMS)
def test_terms_that_cannot_be_kept_are_refused(clause, mode, change, d, rule):
    with pytest.raises(PlanRefusedError) as refused:
        noise_terms(private_plan(mode, change), d)
    assert refused.value.rule == rule, clause


def test_an_insisting_plan_may_drown_its_signal():
    assert noise_terms(private_plan("institution"), 10**4).noise_per_signal > 10


@pytest.mark.parametrize("variance", [Fraction(1, 16), Fraction(1), Fraction(16), Fraction(90_001)])
def test_no_table_is_further_from_its_law_than_is_charged(variance):
    assert NoiseTable.build(variance).distance <= MOST_DISTANCE


def test_the_limit_is_one_that_a_vector_can_have():
    terms = noise_terms(private_plan("institution"), 100)
    assert 1 <= terms.limit <= Ring(20).clamp_limit(3)


# -- claims ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", PRIVATE_MODES)
def test_a_claim_says_what_is_charged(mode):
    plan = private_plan(mode)
    claim = claim_of(plan, 0, 1000)
    assert Claim.from_value(json.loads(json.dumps(claim.to_value()))) == claim
    assert claim.charge() == noise_terms(plan, 1000).charge
    assert "." not in json.dumps([v for v in claim.to_value().values() if isinstance(v, float)])


def test_rounds_that_only_evaluate_and_modes_without_privacy_claim_nothing():
    evaluating = {"evaluation.languages": ["es"], "privacy.held_out": "public"}
    plan = private_plan("record-local", evaluating)
    assert claim_of(plan, plan.total_rounds - 1, 1000) is None
    assert claim_of(plan, 0, 1000) is not None
    secure = plan_value(mode="aggregate-only", min_participants=3, secagg=SECAGG)
    assert claim_of(Plan.from_value(secure), 0, 1000) is None
    assert set(KEYS) == set(plan.roster)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema", "minga.privacy-claim/2"),
        ("count", 0),
        ("count", "3"),
        ("failure", "2/4"),
        ("failure", "-1/4"),
        ("distance", "1/0"),
        ("delta", "2"),
        ("relation", "replace_one"),
        ("event.kind", "gaussian"),
        ("event.sampling_rate", "1.5"),
        ("event.sampling_rate", "0.050"),
        ("event.noise_multiplier", "nan"),
        ("event.noise_multiplier", "0.0"),
        ("surprise", 1),
    ],
)
def test_a_damaged_claim_is_refused(path, value):
    document = claim_of(private_plan("record-local"), 0, 1000).to_value()
    spot, parts = document, path.split(".")
    for part in parts[:-1]:
        spot = spot[part]
    spot[parts[-1]] = value
    with pytest.raises(MalformedMessageError):
        Claim.from_value(document)


def test_what_was_claimed_can_be_added_up_by_anybody():
    first = claim_of(private_plan("record-local"), 0, 1000)
    other = claim_of(private_plan("record-local", {"privacy.dataset": "letters"}), 0, 1000)
    spent = spent_by([("a", first), ("b", first), ("a", first), ("a", other)])
    assert [(s.institution, s.dataset, s.claims) for s in spent] == [
        ("a", "default", 2),
        ("a", "letters", 1),
        ("b", "default", 1),
    ]
    twice, _, once = (s.guarantee.epsilon for s in spent)
    assert once < twice < 2 * once
    # The smallest delta that anybody named stands for all: epsilon can only grow.
    strict = claim_of(private_plan("record-local", {"privacy.delta": "1e-7"}), 0, 1000)
    mixed = spent_by([("a", first), ("a", strict)])[0].guarantee
    assert mixed.delta == 1e-7
    assert mixed.epsilon > twice


def test_the_golden_plans_and_what_they_claim():
    """Other figures for the same plan would be another promise: these may never change."""
    golden = {
        "record-local": ("SampledGaussianClaim", 10, "1/1000000000000"),
        "record-distributed": ("SampledGaussianClaim", 1, "1/1000000000000"),
        "institution": ("DistributedClaim", 1, "0"),
    }
    for mode, row in FILES["privacy.json"]().items():
        plan = Plan.from_bytes(row["plan"].encode())
        assert plan.digest == row["digest"]
        claim = claim_of(plan, 0, 1000)
        assert (type(claim.event).__name__, claim.count, claim.failure) == golden[mode]
    assert claim.event.l2_squared == "1049865"
    assert claim.event.share_variance == "1049865/2"
